"""RIA as a component: its scores on every way of storing a matrix, and its masks."""

from __future__ import annotations

import pytest
import torch
from problems import problem, uniform
from tiny_models import tiny_model

from prunekit.architecture.linear import weight_of
from prunekit.architecture.matrices import module_name
from prunekit.registry import pruners


def pose(model, tokens):
    return problem(model, tokens, criterion={"name": "ria"}, ratio=uniform(0.5))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen2_moe"])
def test_scores_are_stored_like_the_matrices(name, tokens):
    model = tiny_model(name)
    asked = pose(model, tokens)
    groups = asked.matrices()
    seen = {}
    for g in groups:
        module = model.get_submodule(module_name(g))
        module.register_forward_pre_hook(lambda m, args, n=g.name: seen.setdefault(n, args[0]))
    scores = asked.score(groups, asked.run())
    for g in groups:
        module = model.get_submodule(module_name(g))
        W = weight_of(module).detach().abs()
        x = seen[g.name].reshape(-1, W.shape[1]).norm(dim=0)
        plain = (W / W.sum(0) + W / W.sum(1, keepdim=True)) * x**0.5
        plain = plain if isinstance(module, torch.nn.Linear) else plain.T
        torch.testing.assert_close(scores[g.name], plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scope", ["matrix", "row"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen2_moe"])
def test_half_of_every_matrix_goes(name, scope, tokens):
    model = tiny_model(name)
    pruned = pruners.build({"name": "unstructured", "scope": scope})(pose(model, tokens))
    for g in pruned.groups:
        W = weight_of(model.get_submodule(module_name(g)))
        assert int((W == 0).sum()) == W.numel() // 2
        if scope == "row":
            assert set((W == 0).sum(1).tolist()) == {W.shape[1] // 2}
