"""BESA as a ratio: what it allocates on several architectures, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from problems import check, problem
from tiny_models import tiny_model

from prunekit.activations.blockwise import iterate_blocks
from prunekit.activations.storage import PassOptions
from prunekit.architecture.blocks import block_names
from prunekit.architecture.matrices import matrix
from prunekit.errors import ConfigError, NeedsData
from prunekit.registry import pruners
from prunekit.scoring.wanda import input_norms


def pose(model, tokens=None, criterion="wanda", **options):
    node = criterion and {"name": criterion}
    return problem(model, tokens, criterion=node, ratio={"name": "besa", "rate": 0.2, **options})


@pytest.mark.parametrize("per", ["matrix", "row"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen2_moe"])
def test_every_block_loses_its_share_and_the_model_is_as_before(name, per, tokens):
    model = tiny_model(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    asked = pose(model, tokens, per=per, target=0.6)
    groups = asked.matrices()
    found = asked.allocate(groups)
    for k, v in model.state_dict().items():
        assert torch.equal(v, before[k]), k
    for layer in range(2):
        inside = [g for g in groups if g.layer == layer]
        total = sum(g.units for g in inside)
        coarse = 1 if per == "row" else max(matrix(model, g).shape[0] for g in inside)
        assert 0 <= int(0.6 * total) - sum(found.counts[g.name] for g in inside) < coarse
    assert found.ranking == ("rows" if per == "row" else "local")
    shares = {g.name: found.counts[g.name] / g.units for g in groups}
    assert len(set(shares.values())) > 2
    if per == "row":
        for g in groups:
            assert found.rows[g.name].shape == matrix(model, g).shape[:1]
            assert int(found.rows[g.name].sum()) == found.counts[g.name]
        assert len({n for r in found.rows.values() for n in r.tolist()}) > 4


@pytest.mark.parametrize("prefix", ["pruned", "dense"])
def test_learned_rows_lower_the_error_of_every_block(prefix, tokens):
    found = pose(tiny_model("llama"), tokens, prefix=prefix, epochs=10)
    notes = found.allocate(found.matrices()).notes["besa"]
    assert len(notes["learned"]) == len(notes["uniform"]) == 2
    assert all(a < b for a, b in zip(notes["learned"], notes["uniform"]))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("per", ["matrix", "row"])
def test_the_pruner_removes_what_is_allocated(name, per, tokens):
    model = tiny_model(name)
    asked = pose(model, tokens, per=per)
    told = asked.allocate(asked.matrices())
    pruned = pruners.build({"name": "unstructured"})(asked)
    for g in pruned.groups:
        zeros = (matrix(model, g) == 0).sum(1)
        assert int(zeros.sum()) == told.counts[g.name]
        if per == "row":
            assert torch.equal(zeros, told.rows[g.name])
    assert pruned.notes["besa"]["learned"]


def plain_pass(asked, rows):
    """Block by block with Wanda's order, on what the pruned blocks before put out."""
    groups = asked.matrices()
    for row, run in asked.by_block(groups, {g.name: g.units for g in groups}, PassOptions()):
        norms = input_norms(asked.model, row, run)
        for g in row:
            W = matrix(asked.model, g)
            scores = W.abs() * norms[g.name]
            for i, n in enumerate(rows[g.name].tolist()):
                W[i, scores[i].argsort(stable=True)[:n]] = 0


@torch.no_grad()
@pytest.mark.parametrize("schedule", ["blocks", "whole"])
def test_the_pruner_takes_the_masks_that_it_would_choose(schedule, tokens):
    """With schedule=blocks no block runs again; scores of the dense model are other ones."""
    asked, plain = (pose(tiny_model("llama", layers=3), tokens) for _ in range(2))
    allocation = asked.allocate(asked.matrices())
    plain_pass(plain, allocation.rows)
    asked = replace(asked, ratio=lambda problem, groups: allocation)
    runs = []
    hook = asked.model.model.layers[0].register_forward_hook(lambda *_: runs.append(1))
    pruners.build({"name": "unstructured", "schedule": schedule})(asked)
    hook.remove()
    same = [torch.equal(matrix(asked.model, g), matrix(plain.model, g)) for g in asked.matrices()]
    assert all(same) == (schedule == "blocks")
    assert bool(runs) == (schedule == "whole")


@pytest.mark.parametrize("prefix", ["pruned", "dense"])
def test_the_next_block_is_fed_what_the_block_puts_out(prefix, tokens, monkeypatch):
    """What was computed for the errors serves as the next block's inputs."""
    seen = {}

    def inputs(model, groups, run):
        seen[run.block] = run.inputs[slice(0, len(run.tokens))].clone()
        return input_norms(model, groups, run)

    monkeypatch.setattr("prunekit.ratios.besa.input_norms", inputs)
    asked = pose(tiny_model("llama", layers=3), tokens, criterion=None, prefix=prefix)
    allocation = asked.allocate(asked.matrices())
    plain = pose(tiny_model("llama", layers=3), tokens)
    if prefix == "pruned":
        with torch.no_grad():
            plain_pass(plain, allocation.rows)
    blocks = block_names(plain.model)
    for run in iterate_blocks(plain.model, blocks, tokens, PassOptions()):
        torch.testing.assert_close(seen[run.block], run.inputs[slice(0, len(tokens))])


def test_a_block_sees_what_the_pruned_ones_before_it_put_out(tokens):
    """Blocks fed by dense ones have other errors from the second on."""
    found = {}
    for prefix in ("pruned", "dense"):
        asked = pose(tiny_model("llama", layers=3), tokens, prefix=prefix)
        found[prefix] = asked.allocate(asked.matrices()).notes["besa"]["uniform"]
    alone = asked.allocate([g for g in asked.matrices() if g.layer == 1]).notes["besa"]["uniform"]
    assert found["pruned"][0] == pytest.approx(found["dense"][0])
    assert found["dense"][1] == pytest.approx(alone[0])
    assert found["pruned"][1] != pytest.approx(alone[0])


def test_shares_that_raise_the_error_are_not_taken(tokens, monkeypatch):
    """Learned is here that all of it goes from the first matrices."""

    def learn(matrices, *_, **__):
        return {n: torch.tensor([float(i < 3)]) for i, n in enumerate(matrices)}

    monkeypatch.setattr("prunekit.ratios.besa.learn", learn)
    asked = pose(tiny_model("llama"), tokens, per="matrix")
    groups = asked.matrices()
    found = asked.allocate(groups)
    assert all(a > b for a, b in zip(*found.notes["besa"].values()))
    assert all(abs(found.counts[g.name] / g.units - 0.5) < 0.01 for g in groups)


def test_the_order_is_the_criterion_s_and_wanda_s_where_there_is_none(tokens):
    found = {}
    for criterion in ("wanda", None, "random"):
        asked = pose(tiny_model("llama"), tokens, criterion=criterion, per="matrix")
        found[criterion] = asked.allocate(asked.matrices()).notes["besa"]["uniform"]
    assert found["wanda"] == pytest.approx(found[None])
    assert found["random"][0] > 1.2 * found["wanda"][0]


def test_what_it_cannot_allocate_is_refused_by_name(tokens):
    model = tiny_model("llama")
    asked = pose(model, tokens)
    with pytest.raises(ConfigError, match="neurons.0 is no matrix"):
        asked.allocate(asked.units(["neurons"]))
    norm = replace(asked.matrices()[0], matrix="model.layers.0.input_layernorm.weight")
    with pytest.raises(ConfigError, match=r"q_proj is no matrix of a linear module"):
        asked.allocate([norm])
    with pytest.raises(NeedsData):
        pose(model).allocate(asked.matrices())


def test_rows_of_their_own_and_a_pattern_are_refused_before_the_work():
    with pytest.raises(ConfigError, match=r"ratio\.per=matrix"):
        check("unstructured", pose(tiny_model("llama")), pattern="2:4")
    asked = pose(tiny_model("llama"), per="matrix")
    assert check("unstructured", asked, pattern="2:4").counts is None


def test_nothing_to_remove_costs_nothing(tokens):
    asked = pose(tiny_model("llama"), tokens, target=0.0)
    assert asked.allocate(asked.matrices()).empty
