"""Feed-forward blocks found by what they do, on models written for the test."""

from __future__ import annotations

import pytest
import torch
from reference import tiny_llama
from torch import nn
from torch.nn import functional as F

from prunekit import graph
from prunekit.errors import ConfigError
from prunekit.graph.feed_forward import feed_forwards, neurons_of
from prunekit.graph.replay import Span, record
from prunekit.types import Group, Member


class Block(nn.Module):
    """Two linear modules of nameless roles, one reader, and what `between` does."""

    def __init__(self, between, fused=False, bias=True):
        super().__init__()
        self.between, self.fused = between, fused
        self.one = nn.Linear(4, 12 if fused else 6, bias=bias)
        self.two = nn.Linear(4, 6, bias=bias)
        self.three = nn.Linear(6, 4, bias=bias)

    def forward(self, x):
        a, b = self.one(x).chunk(2, -1) if self.fused else (self.one(x), self.two(x))
        return self.three(self.between(a, b))


def block_of(module, makers=("one", "two")):
    rows = torch.arange(6)[:, None]
    members = [Member(f"{m}.weight", 0, rows) for m in makers]
    if module.fused:
        members = [Member("one.weight", 0, torch.stack([rows[:, 0], rows[:, 0] + 6], 1))]
    group = Group("neurons.0", "neurons", 0, 6, (*members, Member("three.weight", 1, rows)))
    (found,) = feed_forwards(module, [group])
    return found


def recorded(module, block, x=None):
    span = Span(tuple(dict.fromkeys(r.module for r in block.makers)), block.reader)
    x = torch.randn(2, 5, 4) if x is None else x
    return record(module, {"b": span}, (module(x) for _ in range(2))).get("b")


@pytest.mark.parametrize(
    ("between", "gate", "up", "act"),
    [
        (lambda a, b: F.silu(a) * b, "one", "two", F.silu),
        (lambda a, b: a * F.gelu(b), "two", "one", F.gelu),
        (lambda a, b: a.mul_(torch.sigmoid(b)), "two", "one", torch.sigmoid),
        (lambda a, b: F.relu(a).square() * b, "one", "two", lambda s: F.relu(s).square()),
    ],
    ids=["gate first", "gate second", "in place", "several operations"],
)
def test_the_gate_is_the_maker_that_the_neurons_are_not_linear_in(between, gate, up, act):
    module = Block(between)
    block = block_of(module)
    found = neurons_of(module, block, recorded(module, block))
    assert (found.gate.module, found.up.module) == (gate, up)
    s = torch.randn(7, 6, requires_grad=True)
    torch.testing.assert_close(found.act(s), act(s))
    (slope,) = torch.autograd.grad(found.act(s).sum(), s)
    (expected,) = torch.autograd.grad(act(s).sum(), s)
    torch.testing.assert_close(slope, expected)


def test_one_matrix_may_hold_both():
    module = Block(lambda a, b: a * F.silu(b), fused=True)
    block = block_of(module)
    found = neurons_of(module, block, recorded(module, block))
    assert found.gate.module == found.up.module == "one"
    assert found.gate.index.tolist() == [6, 7, 8, 9, 10, 11]
    assert found.up.index.tolist() == [0, 1, 2, 3, 4, 5]


def test_without_a_gate():
    module = Block(lambda a, b: F.relu(a))
    block = block_of(module, ["one"])
    found = neurons_of(module, block, recorded(module, block))
    assert found.gate is None
    assert found.up.module == "one"
    z = torch.randn(3, 6)
    torch.testing.assert_close(found.act(z), F.relu(z))


@pytest.mark.parametrize(
    "between",
    [
        lambda a, b: F.silu(a) * b.square(),
        lambda a, b: torch.softmax(a, -1) * b,
        lambda a, b: F.layer_norm(F.silu(a) * b, (6,)),
        lambda a, b: F.silu(a) + b,
    ],
    ids=["not linear", "not elementwise", "a norm", "a sum"],
)
def test_what_is_no_product_is_refused_by_name(between):
    module = Block(between)
    block = block_of(module)
    with pytest.raises(ConfigError, match="neurons.0: between one, two and three"):
        neurons_of(module, block, recorded(module, block))


def test_what_does_not_reach_the_reader_is_not_recorded():
    module = Block(lambda a, b: torch.ones(2, 5, 6))
    assert recorded(module, block_of(module)) is None


def test_a_replay_runs_on_other_tensors_of_another_length():
    module = Block(lambda a, b: F.silu(a) * b)
    block = block_of(module)
    replay = recorded(module, block)
    a, b = torch.randn(2, 31, 6)
    torch.testing.assert_close(replay({"one": a, "two": b}), F.silu(a) * b)


def test_hooks_come_off_and_recording_ends():
    module = Block(lambda a, b: F.silu(a) * b)
    recorded(module, block_of(module))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_a_forward_that_fails_on_the_way_ends_the_recording_too():
    def between(a, b):
        raise KeyError

    module = Block(between)
    with pytest.raises(KeyError):
        recorded(module, block_of(module))
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_llama():
    model = tiny_llama()
    found = feed_forwards(model, graph.discover(model, verify=False))
    assert [f.name for f in found] == ["neurons.0", "neurons.1"]
    assert found[1].reader == "model.layers.1.mlp.down_proj"
    assert found[1].modules == {f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up", "down")}
    spans = {f.name: Span(tuple(r.module for r in f.makers), f.reader) for f in found}
    ids = torch.arange(8, 16)[None]
    replays = record(model, spans, (model(ids) for _ in range(1)))
    for f in found:
        neurons = neurons_of(model, f, replays[f.name])
        assert neurons.gate.module.endswith("gate_proj")
        s = torch.randn(5, 20)
        torch.testing.assert_close(neurons.act(s), F.silu(s))


@pytest.mark.parametrize(
    ("arch", "gated"),
    [("gpt2", False), ("opt", False), ("phi3", True), ("qwen2_moe", True), ("gemma2", True)],
)
def test_architectures(tiny_archs, arch, gated):
    model = tiny_archs.tiny_model(arch, layers=2).eval()
    found = feed_forwards(model, graph.discover(model, verify=False))
    assert len(found) == 2
    spans = {f.name: Span(tuple({r.module for r in f.makers}), f.reader) for f in found}
    replays = record(model, spans, (model(torch.arange(8, 24)[None]) for _ in range(1)))
    for f in found:
        assert (neurons_of(model, f, replays[f.name]).gate is not None) == gated
