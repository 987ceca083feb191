"""Curvature factors against the products of inputs and gradients that autograd shows, token by
token.
"""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model

from prunekit.activations.runs import ModelRun
from prunekit.architecture.blocks import linear_names
from prunekit.errors import ConfigError
from prunekit.scoring.kronecker import kronecker_factors


def plain(model, name, tokens):
    """Inputs (tokens, in + 1), a 1 behind them, and gradients of the summed loss (tokens, out), one
    sample at a time.
    """
    seen = []

    def keep(module, args, out):
        out.retain_grad()
        seen.append((args[0], out))

    hook = model.get_submodule(name).register_forward_hook(keep)
    for ids in tokens:
        loss = model(ids[None], labels=ids[None], use_cache=False).loss
        (loss * (len(ids) - 1)).backward()
    hook.remove()
    x = torch.cat([x.reshape(-1, x.shape[-1]) for x, _ in seen])
    g = torch.cat([out.grad.reshape(-1, out.shape[-1]) for _, out in seen])
    return torch.cat([x, torch.ones(len(x), 1)], 1).detach(), g


@pytest.mark.parametrize("arch", ["llama", "gpt2", "falcon"])
@pytest.mark.parametrize("batch", [None, 1, 3])
def test_factors_are_means_over_tokens(arch, batch, tokens):
    model = tiny_model(arch)
    names = linear_names(model)
    factors = kronecker_factors(model, names, ModelRun(model, tokens), batch=batch)
    assert list(factors) == list(names)
    for name in names:
        x, g = plain(model, name, tokens)
        found = factors[name]
        predicted = tokens.numel() - len(tokens)
        torch.testing.assert_close(found.inputs(True), x.T @ x / len(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.inputs(False), found.inputs(True)[:-1, :-1])
        torch.testing.assert_close(found.outputs(), g.T @ g / predicted, rtol=1e-3, atol=1e-7)
        assert found.seen == tokens.numel()


def test_all_that_use_a_matrix_count(tokens):
    model = tiny_model("llama")
    first, second = (f"model.layers.{i}.mlp.down_proj" for i in (0, 1))
    model.get_submodule(second).weight = model.get_submodule(first).weight
    found = kronecker_factors(model, [first], ModelRun(model, tokens))[first]
    rows = [plain(model, name, tokens) for name in (first, second)]
    x, g = (torch.cat(parts) for parts in zip(*rows, strict=True))
    torch.testing.assert_close(found.inputs(True), x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    predicted = tokens.numel() - len(tokens)
    torch.testing.assert_close(found.outputs(), g.T @ g / predicted, rtol=1e-3, atol=1e-7)


def test_the_model_is_left_as_it_was(tokens):
    model = tiny_model("llama")
    frozen = dict(model.named_parameters())["model.norm.weight"].requires_grad_(False)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    with torch.no_grad():
        kronecker_factors(model, linear_names(model), ModelRun(model, tokens))
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    assert not frozen.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_weights_kept_elsewhere_are_refused(tokens):
    model = tiny_model("llama", meta=True)
    with pytest.raises(ConfigError, match="every weight in memory"):
        kronecker_factors(model, linear_names(model), ModelRun(model, tokens))
