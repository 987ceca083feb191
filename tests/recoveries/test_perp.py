"""A small part of the parameters is trained, all else and every zero stays as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from problems import half_of_the_weights
from tiny_models import tiny_model

from prunekit.errors import ConfigError
from prunekit.models.tiny import byte_tokenizer
from prunekit.problem import Problem
from prunekit.recoveries.perp import check_perp, part_names, perp
from prunekit.registry import recoveries

SHORT = {
    "dataset": "text",
    "validation_size": 0,
    "max_length": 32,
    "batch": 4,
    "micro_batch": 2,
    "max_steps": 12,
    "warmup_steps": 0,
    "lr": 1e-2,
    "log_every": 1,
}


def pruned(arch):
    """Half of the weights zero."""
    return half_of_the_weights(tiny_model(arch, vocab_size=259))


def run(out, text, **over):
    perp(Problem(out.model, byte_tokenizer()), out, **{**SHORT, "path": text, **over})
    return out


@pytest.mark.parametrize("updates", ["mask", "scale", None])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt"])
def test_the_loss_falls_and_zeros_and_all_else_stay(arch, updates, text):
    out = pruned(arch)
    parts = ["norms"] if arch == "llama" else ["norms", "biases"]
    before = copy.deepcopy(out.model.state_dict())
    flags = {n: p.requires_grad for n, p in out.model.named_parameters()}
    run(out, text, updates=updates, parts=parts)
    losses = [r["loss"] for r in out.notes["recovery_curve"]]
    assert losses[-1] < losses[0]
    after = out.model.state_dict()
    assert list(after) == list(before)
    assert {n: p.requires_grad for n, p in out.model.named_parameters()} == flags
    chosen = part_names(out.model, parts)
    if updates:
        chosen |= {f"{g.matrix}" for g in out.groups}
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved <= chosen
    assert len(moved) > 0.8 * len(chosen)
    for g in out.groups:
        assert not after[g.matrix][~out.kept[g.name]].any()
        if not updates:
            assert torch.equal(before[g.matrix], after[g.matrix])


def test_how_much_is_trained(text):
    out = run(pruned("llama"), text, updates=None, max_steps=1)
    assert out.notes["recovery_trained_params"] == 5 * 64  # two norms a block, and the last one
    out = run(pruned("llama"), text, parts=[], r=2, targets=["down_proj"], max_steps=1)
    assert out.notes["recovery_trained_params"] == 2 * 2 * (64 + 96)


def test_half_precision_comes_back(text):
    out = pruned("llama")
    out.model.bfloat16()
    run(out, text, max_steps=2)
    assert {p.dtype for p in out.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("over", "says"),
    [
        ({"parts": ["biases"]}, "no module has biases"),
        ({"parts": ["head"]}, "the output matrix is the embedding"),
        ({"parts": [], "updates": None}, "nothing to train"),
        ({"updates": None, "targets": ["q_proj"]}, "are of updates"),
        ({"targets": ["wq"]}, "match no linear module"),
        ({"batch": 3}, "no multiple of micro_batch"),
    ],
)
def test_what_cannot_be_is_said_on_shapes_alone(over, says):
    model = tiny_model("llama", meta=True)
    model.lm_head.weight = model.model.embed_tokens.weight
    defaults = recoveries.entry("perp").defaults
    with pytest.raises(ConfigError, match=says):
        check_perp(model, **{**defaults, **over})


def test_an_output_matrix_of_its_own_can_be_trained(text):
    out = run(pruned("llama"), text, parts=["head"], updates=None, max_steps=1)
    assert out.notes["recovery_trained_params"] == 259 * 64
