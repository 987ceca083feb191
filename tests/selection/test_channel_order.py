"""Channels in another order: the model computes what it did, patterns keep more, and what is stored
is truly N:M.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from foreign import ListedMixtral, with_an_idle_expert
from problems import check, problem, uniform
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from prunekit import checkpoint
from prunekit.architecture.matrices import matrix, module_name
from prunekit.errors import ConfigError
from prunekit.registry import pruners
from prunekit.selection.channel_order import ChannelOrder
from prunekit.selection.free_channels import FreeReaders
from prunekit.types import Allocation

FOLDED = {
    "llama": {"self_attn.o_proj", "mlp.down_proj"},
    "gpt2": {"attn.c_proj", "mlp.c_proj"},
    "opt": {"self_attn.out_proj", "fc2"},
    "qwen2_moe": {"self_attn.o_proj", "mlp.shared_expert.down_proj"},
}
NAMES = list(FOLDED)


def pose(model, tokens=None, criterion="ria"):
    return problem(model, tokens, criterion={"name": criterion}, ratio=uniform(0.5))


def prune(model, tokens, **options):
    options = {"pattern": "2:4", "permute": True} | options
    return pruners.build({"name": "unstructured", **options})(pose(model, tokens))


@torch.no_grad()
def logits(model, tokens):
    return model(tokens).logits


@pytest.mark.parametrize("name", NAMES)
def test_the_model_computes_what_it_did_and_discovery_says_what_is_folded(name, tokens):
    model = tiny_model(name)
    before = logits(model, tokens)
    asked = pose(model, tokens)
    groups = asked.matrices()
    run = asked.run()
    order = ChannelOrder(model, 4)
    scores = asked.score(groups, run)
    found, scores = order.arrange(run, groups, scores, {g.name: 2 for g in groups})
    torch.testing.assert_close(logits(model, tokens), before, rtol=1e-4, atol=1e-4)
    how = {g.name.partition(".")[2].partition(".")[2]: order.notes[g.name]["order"] for g in groups}
    assert {n for n, way in how.items() if way == "folded"} == FOLDED[name]
    assert set(how.values()) == {"folded", "gathered"}
    for note in order.notes.values():
        assert note["share_after"] >= note["share_before"]
    gains = [n["share_after"] - n["share_before"] for n in order.notes.values()]
    assert sum(gains) / len(gains) > 0.01
    for g in found:  # scores moved with the weights
        assert scores[g.name].shape == matrix(model, g).shape or name == "gpt2"


@pytest.mark.parametrize("name", NAMES)
def test_scores_stand_where_their_weights_stand(name, tokens):
    model = tiny_model(name)
    asked = pose(model, tokens)
    groups = asked.matrices()
    order = ChannelOrder(model, 4)
    run = asked.run()
    scores = {g.name: model.get_parameter(g.matrix).detach().clone() for g in groups}
    positive = {n: s.abs() for n, s in scores.items()}
    found, moved = order.arrange(run, groups, positive, {g.name: 2 for g in groups})
    for g in found:
        weight = model.get_parameter(g.matrix).detach()
        assert torch.equal(moved[g.name], weight.abs())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("schedule", ["blocks", "whole"])
def test_what_is_stored_is_two_of_four_and_loads_again(name, schedule, tokens, tmp_path):
    model = tiny_model(name)
    pruned = prune(model, tokens, schedule=schedule)
    for g in pruned.groups:
        W = matrix(model, g)
        assert ((W.reshape(len(W), -1, 4) != 0).sum(2) == 2).all()
        assert torch.equal(pruned.kept[g.name], model.get_parameter(g.matrix) != 0)
    facts = {"kept": pruned.kept, "groups": pruned.groups}
    checkpoint.save(model, None, tmp_path / "out", **facts)
    ours = checkpoint.load(tmp_path / "out")[0]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    for loaded in (ours, theirs.eval()):
        assert torch.equal(logits(loaded, tokens), logits(model, tokens))
        for g in pruned.groups:
            assert torch.equal(matrix(loaded, g), matrix(model, g))


def test_less_of_the_score_goes_than_without(tokens):
    found = {}
    for permute in (False, True):
        model = tiny_model("llama")
        dense = logits(model, tokens)
        pruned = prune(model, tokens, permute=permute)
        found[permute] = (logits(model, tokens) - dense).norm()
        assert bool(pruned.notes.get("channels")) == permute
    assert found[True] < found[False]


def test_mixed_patterns_leave_a_matrix_that_keeps_all_in_place(tokens):
    model = tiny_model("llama")
    asked = replace(
        pose(model, tokens),
        ratio=lambda asked, groups: Allocation(
            {g.name: 0 if "q_proj" in g.name else g.units // 4 for g in groups}
        ),
    )
    options = {"name": "unstructured", "pattern": "N:4", "permute": True}
    pruned = pruners.build(options)(asked)
    assert not [n for n in pruned.notes["channels"] if "q_proj" in n]
    for g in pruned.groups:
        if "q_proj" not in g.name:
            W = matrix(model, g)
            assert ((W.reshape(len(W), -1, 4) != 0).sum(2) == 3).all()


def test_the_inputs_of_an_expert_without_a_token_may_stand_as_they_are(tokens):
    torch.manual_seed(0)
    model = with_an_idle_expert(ListedMixtral()).eval()
    pruned = prune(model, tokens % 97)
    notes = pruned.notes["channels"]
    idle = [n for n in notes if ".experts.4." in n]
    assert len(idle) == 9
    assert all(notes[n]["share_before"] == notes[n]["share_after"] == 1 for n in idle)
    assert all(notes[n]["share_after"] < 1 for n in notes if n not in idle)


def test_heads_that_runs_do_not_divide_are_gathered_for(tokens):
    """Heads of 20 channels hold no whole runs of 8."""
    model = tiny_model("llama")
    free = FreeReaders(model)
    run = pose(model, tokens).run()
    reader = "model.layers.0.self_attn.o_proj"
    assert len(free.of(reader, run, 4)) == 2  # a set for each key and value head
    assert free.of(reader, run, 4)[0].read.shape == (20, 2)
    assert FreeReaders(model).of(reader, run, 8) == []


def test_channels_that_do_not_belong_together_are_not_taken_to_be_free(tokens):
    model = tiny_model("llama")
    run = pose(model, tokens).run()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    free = FreeReaders(model)
    reader = "model.layers.0.mlp.down_proj"
    group = free.groups[reader]
    free.groups[reader] = replace(group, members=group.members[1:])  # without the gate
    assert free.of(reader, run, 4) == []
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_matrix_in_two_places_stays_in_its_order(tokens, caplog):
    model = tiny_model("llama")
    for n in ("q_proj", "down_proj"):
        first, second = (b.self_attn if n == "q_proj" else b.mlp for b in model.model.layers)
        getattr(second, n).weight = getattr(first, n).weight
    dense = logits(model, tokens)
    asked = pose(model, tokens)
    groups = asked.matrices()
    run = asked.run()
    order = ChannelOrder(model, 4)
    order.arrange(run, groups, asked.score(groups, run), {g.name: 2 for g in groups})
    torch.testing.assert_close(logits(model, tokens), dense, rtol=1e-4, atol=1e-4)
    assert order.notes["weights.0.self_attn.q_proj"]["order"] == "kept"
    assert order.notes["weights.0.mlp.down_proj"]["order"] == "kept"
    assert "used in several places" in caplog.text


def test_orders_without_a_pattern_are_refused_before_the_work():
    with pytest.raises(ConfigError, match=r"give pruner\.pattern"):
        check("unstructured", pose(tiny_model("llama")), permute=True)
    asked = pose(tiny_model("llama"), criterion="dass")
    with pytest.raises(ConfigError, match="compares along outputs"):
        check("unstructured", asked, permute=True, pattern="2:4")


def test_modules_behind_a_gather_are_named_in_the_groups(tokens):
    model = tiny_model("llama")
    pruned = prune(model, tokens)
    names = {module_name(g) for g in pruned.groups}
    assert "model.layers.0.self_attn.q_proj.linear" in names
    assert "model.layers.0.mlp.down_proj" in names
