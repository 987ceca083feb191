"""DaSS as a component: which matrices it takes, along what their weights compete, and that the
result says so.
"""

from __future__ import annotations

import logging

import pytest
import torch
from problems import check, problem, uniform
from tiny_models import tiny_model

from prunekit.architecture.linear import weight_of
from prunekit.criteria.dass import competing_axes
from prunekit.errors import ConfigError
from prunekit.registry import pruners


def pose(model, tokens=None, **options):
    return problem(model, tokens, criterion={"name": "dass", **options}, ratio=uniform(0.5))


def prune(asked, **options):
    return pruners.build({"name": "unstructured", **options})(asked)


@torch.no_grad()
def channel_norms(module, model, tokens):
    """(inputs,) norms of what a module reads."""
    seen = []
    hook = module.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model(tokens)
    hook.remove()
    return seen[0].flatten(0, -2).norm(dim=0)


@pytest.mark.parametrize(
    ("name", "making", "reading"),
    [
        ("llama", ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]),
        ("gpt2", ["mlp.c_fc"], ["mlp.c_proj"]),
        ("opt", ["fc1"], ["fc2"]),
        (
            "qwen2_moe",
            ["mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"],
            ["mlp.shared_expert.down_proj"],
        ),
    ],
)
def test_matrices_of_the_ffn_are_found_and_attention_stays_dense(
    name, making, reading, tokens, caplog
):
    model = tiny_model(name)
    asked = pose(model, tokens)
    axes = competing_axes(model, asked.matrices())
    assert axes == {f"weights.{i}.{n}": 0 for i in range(2) for n in making} | {
        f"weights.{i}.{n}": 1 for i in range(2) for n in reading
    }
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with caplog.at_level(logging.INFO):
        pruned = prune(asked)
    assert "stay dense" in caplog.text
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {g.matrix for g in pruned.groups}
    assert {g.name for g in pruned.groups} == axes.keys()
    for g in pruned.groups:
        W = weight_of(model.get_submodule(g.matrix.removesuffix(".weight")))
        zeros = (W == 0).sum(axes[g.name]).tolist()
        assert set(zeros) == {W.shape[axes[g.name]] // 2}
    assert pruned.notes["compared_along_outputs"] == [n for n, axis in axes.items() if axis == 0]


def test_a_matrix_of_the_gate_is_scored_by_what_the_ffn_puts_into_down(tokens):
    model = tiny_model("llama")
    asked = pose(model, tokens, alpha=0.7)
    groups = asked.matrices(["gate_proj", "up_proj", "down_proj"])
    scores = asked.score(groups, asked.run())
    norms = [channel_norms(model.model.layers[i].mlp.down_proj, model, tokens) for i in range(2)]
    for g in groups:
        W = model.get_parameter(g.matrix).detach().abs()
        z = norms[g.layer]
        plain = W * z if "down" in g.name else W * (z**0.7)[:, None]
        torch.testing.assert_close(scores[g.name], plain, rtol=1e-4, atol=1e-5)


def test_one_fused_matrix_of_gate_and_up_is_scored_channel_by_channel(tokens):
    """Phi-3 makes gate and up in one matrix: both rows of a channel have its norm."""
    model = tiny_model("phi3")
    asked = pose(model, tokens)
    groups = asked.matrices(["gate_up_proj"])
    assert competing_axes(model, groups) == {g.name: 0 for g in groups}
    scores = asked.score(groups, asked.run())
    norms = channel_norms(model.model.layers[0].mlp.down_proj, model, tokens).repeat(2)
    plain = model.model.layers[0].mlp.gate_up_proj.weight.abs() * norms[:, None] ** 0.5
    torch.testing.assert_close(scores[groups[0].name], plain.detach(), rtol=1e-4, atol=1e-6)


def test_patterns_of_the_gate_lie_along_its_outputs_and_the_result_says_so(tokens):
    model = tiny_model("llama")
    pruned = prune(pose(model, tokens), pattern="2:4")
    mlp = model.model.layers[0].mlp
    for W in (mlp.gate_proj.weight.T, mlp.up_proj.weight.T, mlp.down_proj.weight):
        assert ((W.reshape(-1, 4) == 0).sum(1) == 2).all()
    assert "sparse tensor cores" in pruned.notes["remark"]
    assert "remark" not in prune(pose(tiny_model("llama"), tokens)).notes


def test_a_model_whose_ffns_are_stacked_experts_is_refused_before_the_work():
    with pytest.raises(ConfigError, match="criterion=dass scores none"):
        check("unstructured", pose(tiny_model("mixtral", meta=True)))


def test_a_pattern_must_divide_the_outputs_of_what_makes_the_channels():
    with pytest.raises(ConfigError, match="gate_proj has 96 outputs"):
        check("unstructured", pose(tiny_model("llama")), pattern="10:20")
