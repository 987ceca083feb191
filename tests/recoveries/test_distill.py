"""The pruned model learns what the dense one says: all weights, a part of them, or updates."""

from __future__ import annotations

import copy
from importlib.util import find_spec

import pytest
import torch
from tiny_models import tiny_model
from torch import nn

from prunekit import graph
from prunekit.data.training_examples import collate, file_text, packed
from prunekit.errors import ConfigError
from prunekit.models.tiny import byte_tokenizer
from prunekit.problem import Problem
from prunekit.recoveries.distill import check_distill, distill, same_blocks
from prunekit.registry import recoveries
from prunekit.types import Pruned

SHORT = {
    "dataset": "text",
    "validation_size": 0,
    "max_length": 32,
    "batch": 4,
    "micro_batch": 2,
    "max_steps": 4,
    "warmup_steps": 0,
    "lr": 3e-3,
    "log_every": 1,
}
SIZES = {"hidden": 32, "ffn": 48, "head_dim": 8, "vocab_size": 259}


def small(arch: str = "llama") -> nn.Module:
    return tiny_model(arch, **SIZES)


def narrowed(model: nn.Module, remove: bool = True) -> Pruned:
    """Every other neuron gone."""
    groups = [g for g in graph.discover(model, verify=False) if g.kind == "neurons"]
    kept = {g.name: torch.arange(g.units) % 2 == 0 for g in groups}
    (graph.remove if remove else graph.zero)(model, kept)
    return Pruned(model, kept, groups)


def run_distill(pruned: Pruned, dense: nn.Module, **over) -> Pruned:
    problem = Problem(pruned.model, byte_tokenizer(), load_dense=lambda: dense)
    pruned.model = distill(problem, pruned, **{**SHORT, **over})
    return pruned


@torch.no_grad()
def divergence(student: nn.Module, dense: nn.Module, text: str) -> float:
    """Mean KL(dense || student) over the text."""
    batch = collate(packed(byte_tokenizer(), file_text(text), 32))
    del batch["labels"]
    p, q = (m(**batch).logits.log_softmax(-1) for m in (dense, student))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("arch", ["llama", "gpt_neox"])
@pytest.mark.parametrize("r", [0, 4])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_the_pruned_model_comes_closer_to_the_dense_one(text, arch, r, direction):
    dense, pruned = small(arch), narrowed(small(arch))
    state = copy.deepcopy(dense.state_dict())
    before = divergence(pruned.model, dense, text)
    run_distill(pruned, dense, path=text, max_steps=15, r=r, direction=direction)
    assert divergence(pruned.model, dense, text) < 0.8 * before
    assert all(torch.equal(state[n], w) for n, w in dense.state_dict().items())
    assert not any("lora" in n for n, _ in pruned.model.named_modules())


def test_a_model_like_its_teacher_has_nothing_to_learn(text):
    model = small()
    before = copy.deepcopy(model.state_dict())
    pruned = run_distill(Pruned(model, {}, []), small(), path=text)
    assert [r["loss"] for r in pruned.notes["recovery_curve"] if "loss" in r] == [0.0] * 4
    assert all(torch.equal(before[n], w) for n, w in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_weights_are_trained_or_those_that_targets_name(text, dtype):
    for targets in (None, ["mlp.*"]):
        pruned = narrowed(small().to(dtype))
        pruned.model.model.norm.weight.requires_grad_(False)
        before = copy.deepcopy(pruned.model.state_dict())
        run_distill(pruned, small(), path=text, targets=targets, lr=3e-2)
        after = dict(pruned.model.named_parameters())
        changed = {n for n, p in after.items() if not torch.equal(before[n], p)}
        assert changed == {n for n in after if targets is None or ".mlp." in n}
        assert all(p.dtype is dtype and p.grad is None for p in after.values())
        assert [n for n, p in after.items() if not p.requires_grad] == ["model.norm.weight"]
        count = sum(p.numel() for n, p in after.items() if targets is None or ".mlp." in n)
        assert pruned.notes["recovery_trained_params"] == count


@pytest.mark.parametrize("r", [0, 4])
def test_what_pruning_set_to_zero_stays_zero(text, r):
    pruned = narrowed(small(), remove=False)
    zeros = {n: p == 0 for n, p in pruned.model.named_parameters()}
    assert sum(int(z.sum()) for z in zeros.values()) > 500
    run_distill(pruned, small(), path=text, r=r)
    assert not any(p[zeros[n]].any() for n, p in pruned.model.named_parameters())


def test_the_dense_model_can_write_the_text():
    dense, pruned = small(), narrowed(small())
    options = {"dataset": "generated", "samples": 6, "validation_size": 2, "eval_every": 2}
    run_distill(pruned, dense, **options)
    assert pruned.notes["recovery_examples"] == 4
    assert [r["step"] for r in pruned.notes["recovery_curve"] if "eval_loss" in r] == [2, 4]


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
@pytest.mark.parametrize("arch", ["llama", "gpt_neox"])
def test_a_teacher_in_eight_bits_teaches_nearly_the_same(text, arch):
    dense, teacher = small(arch), small(arch)
    pruned = narrowed(small(arch))
    start = divergence(pruned.model, dense, text)
    losses = {}
    for bits in (None, 8):
        again = Pruned(copy.deepcopy(pruned.model), pruned.kept, pruned.groups)
        run_distill(again, teacher, path=text, teacher_bits=bits)
        losses[bits] = divergence(again.model, dense, text)
    weights = [m.weight for m in teacher.modules() if isinstance(m, nn.Linear)]
    assert all(type(w).__name__ != "Parameter" and w.qdata.dtype == torch.int8 for w in weights)
    assert losses[8] < start
    assert losses[8] == pytest.approx(losses[None], rel=0.02)


def test_without_torchao_eight_bits_are_refused_before_anything_is_read(monkeypatch):
    monkeypatch.setattr("prunekit.training.int8.find_spec", lambda name: None)
    entry, model = recoveries.entry("distill"), tiny_model("llama", meta=True, **SIZES)
    with pytest.raises(ConfigError, match="teacher_bits=8 needs torchao.*prunekit\\[int8\\]"):
        entry.meta["check"](model, **entry.defaults | {"teacher_bits": 8})


def test_eight_bits_are_not_put_into_shards(monkeypatch):
    monkeypatch.setattr("prunekit.training.sharding.wants_shards", lambda: True)
    entry, model = recoveries.entry("distill"), tiny_model("llama", meta=True, **SIZES)
    with pytest.raises(ConfigError, match="teacher_bits=8: FSDP"):
        entry.meta["check"](model, **entry.defaults | {"teacher_bits": 8})


def test_without_the_dense_model_nothing_starts(text):
    model = small()
    with pytest.raises(ConfigError, match="the dense model is not at hand"):
        distill(Problem(model, byte_tokenizer()), Pruned(model, {}, []), **SHORT, path=text)


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ({}, None),
        ({"dataset": "generated"}, None),
        ({"batch": 5, "micro_batch": 2}, "batch=5 is no multiple of micro_batch=2"),
        ({"targets": ["query"]}, r"targets=\['query'\] match no linear"),
        ({"dataset": "text"}, "give path="),
        ({"dataset": "generated", "split": "train"}, "split and path are of no use"),
        ({"dataset": "generated", "samples": 9, "validation_size": 9}, "possible: 0 to 8"),
    ],
)
def test_options_are_checked_on_a_model_without_weights(over, said):
    entry = recoveries.entry("distill")
    assert entry.meta["check"] is check_distill
    model = tiny_model("llama", meta=True, **SIZES)
    if said is None:
        entry.meta["check"](model, **entry.defaults | over)
    else:
        with pytest.raises(ConfigError, match=said):
            entry.meta["check"](model, **entry.defaults | over)


@pytest.mark.parametrize(
    "over",
    [{"weight": 0.0}, {"weight": 1.5}, {"temperature": 0.0}, {"direction": "back"}, {"r": -1}],
)
def test_values_out_of_range_are_refused(over):
    with pytest.raises(ConfigError, match="recovery=distill"):
        recoveries.build({"name": "distill", **over})


@torch.no_grad()
def stream_gap(student: nn.Module, dense: nn.Module, text: str) -> float:
    """Mean relative squared distance of what the first block puts out."""
    batch = collate(packed(byte_tokenizer(), file_text(text), 32))
    del batch["labels"]
    s, t = (m(**batch, output_hidden_states=True).hidden_states[1] for m in (student, dense))
    return float(((s - t).square().sum(-1) / t.square().sum(-1)).mean())


@pytest.mark.parametrize("arch", ["llama", "gpt_neox"])
@pytest.mark.parametrize("r", [0, 4])
def test_hidden_draws_the_residual_stream_to_the_dense_ones(text, arch, r):
    dense = small(arch)
    gaps = {}
    for hidden in (0.0, 30.0):
        pruned = narrowed(small(arch))
        run_distill(pruned, dense, path=text, max_steps=15, r=r, hidden=hidden)
        gaps[hidden] = stream_gap(pruned.model, dense, text)
    assert gaps[30.0] < 0.8 * gaps[0.0]


def test_hidden_knows_which_blocks_are_left(text):
    dense, model = tiny_model("llama", layers=4, **SIZES), tiny_model("llama", layers=4, **SIZES)
    graph.remove(model, {"blocks": torch.tensor([True, False, True, True])})
    assert same_blocks(model, dense) == (0, 2, 3)
    assert same_blocks(small(), small()) == (0, 1)
    less = copy.deepcopy(model)
    graph.remove(less, {"blocks": torch.tensor([False, True, True])})
    assert same_blocks(less, dense) == (2, 3)
    assert same_blocks(less, model) == (1, 2)
    pruned = run_distill(Pruned(model, {}, []), dense, path=text, hidden=1.0)
    assert pruned.notes["recovery_curve"]


def test_hidden_of_other_blocks_or_channels_is_refused():
    with pytest.raises(ConfigError, match="2 blocks before pruning, and the dense model has 4"):
        same_blocks(small(), tiny_model("llama", layers=4, **SIZES))
    with pytest.raises(ConfigError, match="has 24 channels, the dense one's 32"):
        same_blocks(tiny_model("llama", **(SIZES | {"hidden": 24})), small())
