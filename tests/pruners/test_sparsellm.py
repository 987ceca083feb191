"""SparseLLM on tiny models: what feed-forward blocks gain, and that one step is SparseGPT."""

from __future__ import annotations

import copy

import pytest
import torch
from problems import check, problem, uniform
from tiny_models import tiny_model

from prunekit.architecture.matrices import matrix
from prunekit.errors import ConfigError
from prunekit.registry import pruners
from prunekit.solvers.sparsegpt import inverse_factor

ARCHS = ["llama", "gpt2", "opt", "phi3", "qwen2_moe"]
TEXT = torch.randint(8, 100, (16, 32), generator=torch.Generator().manual_seed(0))


def prune(name, model, target=0.5, **options):
    asked, options = problem(model, TEXT, ratio=uniform(target)), {"block": 32} | options
    check(name, asked, **options)
    return pruners.build({"name": name, **options})(asked)


@pytest.mark.parametrize("arch", ARCHS)
def test_one_outer_step_is_sparsegpt_bit_for_bit(arch):
    one, other = tiny_model(arch), tiny_model(arch)
    found, expected = prune("sparsellm", one, steps=1), prune("sparsegpt", other)
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert found.kept.keys() == expected.kept.keys()
    assert found.notes["costs"] == expected.notes["costs"]


def ffn_outputs(model, arch):
    """Outputs of the feed-forward block of the first layer on its own input, and that input."""
    path = {
        "llama": "model.layers.0.mlp",
        "phi3": "model.layers.0.mlp",
        "gpt2": "transformer.h.0.mlp",
        "opt": "model.decoder.layers.0.fc2",
        "qwen2_moe": "model.layers.0.mlp.shared_expert",
    }[arch]
    seen = []
    hook = model.get_submodule(path).register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        model(TEXT)
    hook.remove()
    return seen[0].flatten(0, -2)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_error_that_is_reported_is_the_blocks_and_no_larger_than_sparsegpts(arch):
    """The first block's input is that of the dense model, and its attention is put back."""
    dense, found, swept = (
        tiny_model(arch),
        tiny_model(arch),
        tiny_model(arch),
    )
    out = prune("sparsellm", found)
    prune("sparsegpt", swept)
    errors = {}
    for name, model in (("sparsellm", found), ("sparsegpt", swept)):
        for g in out.groups:
            if not any(part in g.name for part in ("mlp", "fc")):
                param = g.matrix
                model.get_parameter(param).data.copy_(dense.get_parameter(param))
        gap = ffn_outputs(model, arch) - ffn_outputs(dense, arch)
        errors[name] = float(gap.square().mean())
    steps = out.notes["feed_forward_errors"]
    first = steps["neurons.0" if "neurons.0" in steps else "neurons.0.1"]
    assert len(first) == 4
    assert errors["sparsegpt"] == pytest.approx(first[0], rel=1e-3)
    assert errors["sparsellm"] == pytest.approx(min(first), rel=1e-3)
    assert min(first) < first[0]


@pytest.mark.parametrize("arch", ARCHS)
def test_counts_are_exact_and_masks_are_what_stayed(arch):
    model = tiny_model(arch)
    out = prune("sparsellm", model)
    for g in out.groups:
        assert int((matrix(model, g) == 0).sum()) == g.units // 2 == out.notes["counts"][g.name]
        assert torch.equal(model.get_parameter(g.matrix) != 0, out.kept[g.name])
    with torch.no_grad():
        assert torch.isfinite(model(TEXT).logits).all()


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_pattern_holds(arch):
    model = tiny_model(arch)
    for g in prune("sparsellm", model, pattern="2:4").groups:
        W = matrix(model, g)
        assert ((W != 0).view(len(W), -1, 4).sum(-1) == 2).all()


def test_a_block_that_gains_nothing_stays_as_sparsegpt_makes_it(monkeypatch):
    monkeypatch.setattr("prunekit.solvers.sparsellm.refit", lambda weight, *_: -weight)
    one, other = tiny_model("llama"), tiny_model("llama")
    out, expected = prune("sparsellm", one, steps=3), prune("sparsegpt", other)
    assert all(min(e[1:]) > e[0] for e in out.notes["feed_forward_errors"].values())
    assert out.notes["costs"] == expected.notes["costs"]
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_the_reader_is_pruned_for_what_the_neurons_became(monkeypatch):
    """The gram matrix of its input is another one in every step."""
    model, seen = tiny_model("llama"), {}

    def factor(gram, ridge, name):
        seen.setdefault(name, []).append(gram.clone())
        return inverse_factor(gram, ridge, name)

    monkeypatch.setattr("prunekit.pruners.sparsellm.inverse_factor", factor)
    prune("sparsellm", model, steps=3)
    assert list(seen) == ["weights.0.mlp.down_proj", "weights.1.mlp.down_proj"]
    for first, second in seen.values():
        assert not torch.equal(first, second)


def test_matrices_that_hold_no_whole_block_are_refused():
    with pytest.raises(ConfigError, match="none is among the matrices"):
        prune("sparsellm", tiny_model("llama"), targets=["q_proj", "up_proj"])


def test_ratio_zero_changes_nothing():
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    prune("sparsellm", model, target=0.0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_neurons_that_are_no_product_are_refused_before_the_work():
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.gate_proj(x).sin() * mlp.up_proj(x).cos())
    with pytest.raises(ConfigError, match="neurons.1: between .*gate_proj.* and .*down_proj"):
        prune("sparsellm", model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
