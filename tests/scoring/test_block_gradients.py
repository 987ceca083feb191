"""Gradients taken block by block against those of one backward through the whole model."""

from __future__ import annotations

import pytest
import torch
from problems import problem, uniform
from tiny_models import tiny_model

from prunekit.activations.runs import ModelRun
from prunekit.architecture.offload import map_weights
from prunekit.errors import ConfigError
from prunekit.registry import pruners
from prunekit.scoring import block_gradients
from prunekit.scoring.block_gradients import backward_by_block
from prunekit.scoring.gradients import backward
from prunekit.scoring.left_out import check_alone


def taken(how, model, names, tokens, **options):
    found = {}

    def sink(name, weight, gradient, squares):
        assert weight is model.get_parameter(name)
        assert name not in found, "once each"
        found[name] = gradient.clone(), None if squares is None else squares.clone()

    how(model, names, ModelRun(model, tokens), sink, **options)
    return found


def all_names(model, inside=""):
    return [n for n, _ in model.named_parameters() if inside in n]


@pytest.mark.parametrize("arch", ["llama", "gpt_neox", "opt", "gemma2", "mixtral", "falcon"])
@pytest.mark.parametrize("batch", [None, 3])
def test_they_are_those_of_the_whole_model(arch, batch, tokens):
    model = tiny_model(arch, 3 if arch == "llama" else 2)
    names = all_names(model)
    options = {"squares": False, "batch": batch}
    whole = taken(backward, model, names, tokens, **options)
    found = taken(backward_by_block, model, names, tokens, **options)
    assert found.keys() == whole.keys()
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    for name in names:
        if tied and model.get_parameter(name) is model.get_input_embeddings().weight:
            torch.testing.assert_close(found[name][0], whole[name][0], rtol=1e-4, atol=1e-7)
        else:
            assert torch.equal(found[name][0], whole[name][0]), name
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("arch", ["llama", "mixtral"])
def test_squares_are_those_of_one_backward_a_sample(arch, tokens):
    model = tiny_model(arch)
    names = all_names(model, "layers")
    whole = taken(backward, model, names, tokens, squares=True)
    found = taken(backward_by_block, model, names, tokens, squares=True)
    for name in names:
        for ours, theirs in zip(found[name], whole[name], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_only_blocks_from_the_first_wanted_one_run_back(tokens, monkeypatch):
    model, ran = tiny_model("llama", 3), []
    real = block_gradients._ByBlock.block
    monkeypatch.setattr(
        block_gradients._ByBlock, "block", lambda s, b: (ran.append(b), real(s, b))[1]
    )
    name = "model.layers.1.mlp.up_proj.weight"
    found = taken(backward_by_block, model, [name], tokens, squares=False)
    assert ran == [2, 1]
    assert torch.equal(
        found[name][0], taken(backward, model, [name], tokens, squares=False)[name][0]
    )


@pytest.mark.parametrize("store", ["memory", "disk", "bfloat16"])
def test_what_waits_may_wait_elsewhere(store, tokens):
    model = tiny_model("llama")
    names = all_names(model, "layers")
    options = {"squares": False, "batch": 2}
    whole = taken(backward, model, names, tokens, **options)
    found = taken(backward_by_block, model, names, tokens, store=store, **options)
    exact = all(torch.equal(found[n][0], whole[n][0]) for n in names)
    assert exact == (store != "bfloat16")
    for name in names:
        assert (found[name][0] - whole[name][0]).norm() < 0.1 * whole[name][0].norm()


@pytest.mark.parametrize(
    ("criterion", "kinds"), [("taylor", ["neurons", "heads"]), ("block_taylor", ["blocks"])]
)
def test_criteria_go_block_by_block_where_weights_lie_in_files(
    criterion, kinds, tokens, monkeypatch
):
    def scores(model, **options):
        node = {"name": criterion, "batch": 2, **options}
        pruner = pruners.build({"name": "oneshot", "kinds": kinds})
        return pruner(problem(model, tokens, criterion=node, ratio=uniform(0.5)))

    calls = []
    real = block_gradients.backward_by_block
    monkeypatch.setattr(
        block_gradients, "backward_by_block", lambda *a, **k: (calls.append(1), real(*a, **k))[1]
    )
    expected = scores(tiny_model("llama", 4))
    assert not calls
    mapped = tiny_model("llama", 4)
    map_weights(mapped)
    for found in (scores(mapped), scores(tiny_model("llama", 4), by_block=True)):
        assert all(torch.equal(found.scores[n], s) for n, s in expected.scores.items())
        assert all(torch.equal(found.kept[n], k) for n, k in expected.kept.items())
    assert len(calls) == 2


def test_what_cannot_go_block_by_block_is_refused(tokens):
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match=r"embed_tokens.weight is not: give criterion.by_block"):
        taken(backward_by_block, model, all_names(model), tokens, squares=True)


def test_a_block_that_reads_more_of_an_earlier_one_is_refused():
    beside = torch.randn(2, 3)

    class Feed:
        calls = (([((), {})]), ([((), {"first_values": beside.clone()})]))

    with pytest.raises(ConfigError, match=r"b\.1 reads more of b\.0 than the residual stream"):
        check_alone(["b.0", "b.1"], [(None, beside), None], Feed, 0)
    check_alone(["b.0", "b.1"], [(None, beside + 1), None], Feed, 0)


def test_the_model_is_as_it_was_after_a_failure(tokens):
    model = tiny_model("llama")
    before = {n: p.requires_grad_(n.endswith("norm.weight")) for n, p in model.named_parameters()}

    def fail(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        backward_by_block(model, all_names(model), ModelRun(model, tokens), fail, squares=False)
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert all(p.requires_grad == n.endswith("norm.weight") for n, p in before.items())
