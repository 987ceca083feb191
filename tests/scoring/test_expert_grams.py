"""Sums over the tokens of many experts: each gets its own, and the host need not ask for each."""

from __future__ import annotations

import pytest
import torch
from other_device import DEVICE, other_device

from prunekit.activations.gram import GramStatistics
from prunekit.scoring.expert_grams import take_in


def routed(experts: int):
    """Neurons, weights (some zero) and picks of 21 tokens, of which some name no expert here."""
    g = torch.Generator().manual_seed(0)
    index = torch.randint(experts + 1, (21,), generator=g)
    return torch.randn(21, 6, generator=g), torch.rand(21, generator=g).round(decimals=1), index


def nothing(experts: int, device: object = "cpu"):
    return [[GramStatistics(6, device=device) for _ in range(2)] for _ in range(experts)]


@pytest.mark.parametrize("weighted", [True, False])
def test_each_expert_gets_its_own_tokens_in_two_folds(weighted):
    a, g, index = routed(4)
    found = nothing(4)
    take_in(found, a, g, weighted, index)
    for e, folds in enumerate(found):
        for fold, rows in zip(folds, torch.arange(21).chunk(2), strict=True):
            own = rows[((index == e) & (g != 0))[rows]]
            want = GramStatistics(6)
            if len(own):
                want.add(a[own], w=g[own].square() if weighted else None)
            assert fold.tokens == want.tokens == len(own)
            assert torch.equal(fold.gram, want.gram)
            assert torch.equal(fold.total, want.total)


def test_the_host_waits_once_a_fold_however_many_experts_there_are():
    for experts in (3, 12):
        a, g, index = routed(experts)
        found = nothing(experts)
        take_in(found, a, g, True, index)
        with other_device() as waits:
            there = nothing(experts, DEVICE)
            take_in(there, a.to(DEVICE), g.to(DEVICE), True, index.to(DEVICE))
            assert sum(waits.values()) == 2
        for folds, others in zip(found, there, strict=True):
            for fold, other in zip(folds, others, strict=True):
                assert torch.equal(fold.gram, other.gram.held)
