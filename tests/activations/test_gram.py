"""Sums over tokens against plain products, and the unit of ridges."""

from __future__ import annotations

import logging

import pytest
import torch

from prunekit.activations.gram import GramStatistics, SharedGrams, warn_of_little_text


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_sums_are_those_of_all_tokens_however_they_come():
    x, y, w = numbers(6, 4, 3), numbers(6, 4, 2, seed=1), numbers(6, 4, seed=2).exp()
    stats = GramStatistics(3, 2)
    stats.add(x[:4], y[:4], w[:4])
    stats.add(x[4:], y[4:], w[4:])
    a, b, c = x.flatten(0, 1), y.flatten(0, 1), w.flatten()[:, None]
    for found, wanted in (
        (stats.gram, a.T @ (c * a)),
        (stats.cross, a.T @ (c * b)),
        (stats.sum_x, (c * a).sum(0)),
        (stats.sum_y, (c * b).sum(0)),
    ):
        assert torch.allclose(found, wanted, atol=1e-4)
    assert stats.weight == pytest.approx(float(w.sum()), rel=1e-6)
    assert stats.tokens == 24


def test_the_level_leaves_sinks_out_and_the_gram_does_not():
    x = numbers(1, 8, 4)
    x[0, 0] *= 100
    sinks = torch.tensor([[True] + [False] * 7])
    stats = GramStatistics(4)
    stats.add(x, sinks=sinks)
    assert stats.level == pytest.approx(float(x[0, 1:].square().sum()) / 4, rel=1e-5)
    assert float(stats.gram.diagonal().mean()) > 100 * stats.level
    whole = GramStatistics(4)
    whole.add(x)
    assert whole.level == pytest.approx(float(whole.gram.diagonal().mean()), rel=1e-5)


def test_modules_that_are_shown_the_same_tensor_share_a_gram():
    shared, one, other = SharedGrams(), numbers(2, 3, 4), numbers(2, 3, 4, seed=1)
    for name, x in (("q", one), ("k", one), ("up", other), ("q", other), ("k", other)):
        shared.see(name, x)
    assert shared.owner == {"q": "q", "k": "q", "up": "up"}
    both = torch.cat([one, other]).flatten(0, 1)
    assert torch.allclose(shared.sums["q"].gram, both.T @ both, atol=1e-4)


@pytest.mark.parametrize(("tokens", "said"), [(63, 1), (64, 0)])
def test_less_text_than_inputs_is_said(tokens, said, caplog):
    with caplog.at_level(logging.WARNING, logger="prunekit"):
        warn_of_little_text(torch.zeros(1, tokens), 64)
    assert len(caplog.records) == said
