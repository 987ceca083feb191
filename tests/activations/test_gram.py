"""Sums over tokens against plain products."""

from __future__ import annotations

import logging

import pytest
import torch

from prunekit.activations.gram import GramStatistics, SharedGrams, added, warn_of_little_text


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
    assert float(stats.total) == pytest.approx(float(w.sum()), rel=1e-6)
    assert stats.tokens == 24


def test_parts_add_up_to_the_sums_of_all():
    x, y, w = numbers(6, 4, 3), numbers(6, 4, 2, seed=1), numbers(6, 4, seed=2).exp()
    whole, parts = GramStatistics(3, 2), [GramStatistics(3, 2) for _ in range(2)]
    whole.add(x, y, w)
    for part, rows in zip(parts, (slice(0, 2), slice(2, 6)), strict=True):
        part.add(x[rows], y[rows], w[rows])
    both = added(parts)
    for name in ("gram", "cross", "sum_x", "sum_y"):
        assert torch.allclose(getattr(both, name), getattr(whole, name), atol=1e-4), name
    assert (both.tokens, float(both.total)) == (24, pytest.approx(float(whole.total)))
    assert added(parts[:1]) is parts[0]


def test_modules_that_are_shown_the_same_tensor_share_a_gram():
    shared, one, other = SharedGrams(), numbers(2, 3, 4), numbers(2, 3, 4, seed=1)
    for name, x in (("q", one), ("k", one), ("up", other), ("q", other), ("k", other)):
        shared.see(name, x)
    assert shared.owner == {"q": "q", "k": "q", "up": "up"}
    both = torch.cat([one, other]).flatten(0, 1)
    assert torch.allclose(shared.sums["q"].gram, both.T @ both, atol=1e-4)


def test_modules_that_are_shown_no_tokens_do_not_share():
    """Tensors of nothing begin at the same place and have the same shape."""
    shared, one, other = SharedGrams(), numbers(3, 4), numbers(2, 4, seed=1)
    for name, x in (("e0", one[:0]), ("e1", one[:0]), ("e2", one[:0]), ("e0", one), ("e1", other)):
        shared.see(name, x)
    assert shared.owner == {"e0": "e0", "e1": "e1"}
    assert torch.allclose(shared.sums["e1"].gram, other.T @ other, atol=1e-5)


@pytest.mark.parametrize(("tokens", "said"), [(63, 1), (64, 0)])
def test_less_text_than_inputs_is_said(tokens, said, caplog):
    with caplog.at_level(logging.WARNING, logger="prunekit"):
        warn_of_little_text(torch.zeros(1, tokens), {"up": 16, "down": 64})
    assert len(caplog.records) == said
    assert all("the 64 inputs of down, the widest of 1" in m for m in caplog.messages)
