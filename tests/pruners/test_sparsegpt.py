"""SparseGPT on whole models: exact counts, and nearer to the dense model than Wanda."""

from __future__ import annotations

import copy

import pytest
import torch
from problems import problem, uniform
from tiny_models import tiny_model

from prunekit.architecture.matrices import matrix
from prunekit.registry import pruners


def prune(model, tokens, target=0.5, exclude=None, **options):
    pruner = pruners.build({"name": "sparsegpt", **options})
    return pruner(problem(model, tokens, ratio=uniform(target), exclude=exclude))


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2", "gpt_neox", "phi3", "opt"])
def test_half_of_every_matrix_goes_and_the_others_move(tokens, arch):
    model = tiny_model(arch)
    before = copy.deepcopy(model)
    out = prune(model, tokens, block=16)
    for g in out.groups:
        W = matrix(model, g)
        assert int((W == 0).sum()) == g.units // 2 == out.notes["counts"][g.name]
        assert not torch.equal(W, matrix(before, g) * (W != 0))  # the others have moved
    with torch.no_grad():
        assert torch.isfinite(model(tokens).logits).all()


def test_nearer_to_the_dense_model_than_wanda():
    text = torch.randint(8, 100, (32, 32), generator=torch.Generator().manual_seed(0))
    model = tiny_model("llama")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        dense = model(text).logits
    wanda = problem(twin, text, criterion={"name": "wanda"}, ratio=uniform(0.5))
    pruners.build({"name": "unstructured"})(wanda)
    prune(model, text)
    with torch.no_grad():
        assert (model(text).logits - dense).norm() < (twin(text).logits - dense).norm()


def test_weights_of_a_neuron_that_is_always_zero_go_first(tokens):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[5] = 0
        model.model.layers[0].mlp.down_proj.weight[:, 5] = 10
    kept = prune(model, tokens).kept["weights.0.mlp.down_proj"]
    assert not kept[:, 5].any()
    assert kept.float().mean() == 0.5


def test_ratio_zero_changes_nothing(tokens):
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    prune(model, tokens, target=0.0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
