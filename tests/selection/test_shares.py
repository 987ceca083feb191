"""The papers' floor rules, and rounding to multiples."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prunekit.architecture.sizes import Sizes
from prunekit.selection.shares import rounded, solve, units_removed
from prunekit.types import Group, Member


@pytest.mark.parametrize(
    ("units", "width", "share", "removed"),
    [
        (11008, 1, 0.25, 2752),  # LLaMA-7B, block 20 %
        (11008, 1, 0.60, 11008 - 4403),  # block 50 %
        (32, 128, 0.25, 8),
        (32, 128, 0.60, 19),
        (4096, 1, 0.20, 4096 - 3276),  # channel 20 %
        (4096, 1, 0.50, 2048),
        (8, 128, 0.25, 2),  # Llama-3-8B kv heads
        (4, 64, 0.25, 1),  # TinyLlama kv heads
        (3, 64, 0.328, 0),  # SmolLM2: 0.98 of a head is no head
        (3, 64, 0.334, 1),
        (1536, 1, 0.328, 1536 - 1032),
        (10, 1, 0.0, 0),
        (2, 1, 0.99, 1),  # never empties
    ],
)
def test_the_papers_floor_rules(units, width, share, removed):
    group = Group(
        "g", "heads" if width > 1 else "neurons", 0, units, (type("M", (), {"width": width})(),)
    )
    assert units_removed(group, share) == removed


def test_multiple_rounds_kept_neurons():
    group = Group("g", "neurons", 0, 1536)
    assert (1536 - rounded(group, 504, {"neurons": 64})) % 64 == 0
    assert rounded(group, 0, {"neurons": 64}) == 0


def test_what_fills_the_gap_keeps_to_the_multiple():
    """The first step of 90 neurons leaves 80, not 74."""
    model = nn.ModuleDict({"a": nn.Linear(90, 100, False), "b": nn.Linear(4, 1700, False)})
    groups = [
        Group("a", "neurons", 0, 90, (Member("a.weight", 1, torch.arange(90)[:, None]),)),
        Group("b", "heads", 0, 4, (Member("b.weight", 1, torch.arange(4)[:, None]),)),
    ]
    counts = solve(groups, Sizes(model, groups), 909.0, {"neurons": 16}, what="this")
    assert counts == {"a": 10, "b": 0}
