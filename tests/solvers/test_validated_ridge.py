"""Ridges chosen by held-out text: the error they are judged by, and where they end up."""

from __future__ import annotations

import pytest
import torch
from other_device import DEVICE, other_device
from regressions import data, gathered

from prunekit.activations.gram import GramStatistics, added
from prunekit.solvers.least_squares import prior_ridge, ridge_problem
from prunekit.solvers.validated_ridge import Ridges, held_out_error, validated

KEPT = torch.arange(0, 24, 2)


def sums(x):
    stats = GramStatistics(24)
    stats.add(x)
    return stats


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_held_out_error_is_that_of_the_fitted_map(affine, weighted):
    x, W = data(seed=0)
    new = data(seed=0)[0].flip(1)  # other inputs, the same weights
    y, z = (torch.randn(len(x), 7, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    w = torch.rand(len(x), generator=torch.Generator().manual_seed(3)) if weighted else None
    fit, test, ridges = gathered(x, y), gathered(new, z, w), Ridges(50.0, 20.0)
    A, b = ridge_problem(fit, W, 50.0, affine, 20.0).solve(KEPT)
    off = new.double() @ W.double().T + z - new[:, KEPT].double() @ A.T
    off = off if b is None else off - b
    counted = torch.ones(len(x)) if w is None else w
    expected = (counted[:, None] * (off.square() - z.square())).sum().item()
    found = held_out_error(fit, test, W, KEPT, affine, ridges)
    assert found == pytest.approx(expected, rel=1e-4)


def test_little_text_is_held_near_the_dense_weights_and_much_text_is_followed():
    """Inputs that have nothing to do with each other: what few tokens say of the others is
    noise.
    """
    x, W = torch.randn(30, 24, generator=torch.Generator().manual_seed(0)), data()[1]
    start = Ridges(prior_ridge(24), 1.0)
    little = validated([sums(x[:15]), sums(x[15:])], W, KEPT, True, start, ["ridge"])
    assert little.ridge > start.ridge
    mixed = data(tokens=4000)[0]
    much = validated([sums(mixed[::2]), sums(mixed[1::2])], W, KEPT, True, start, ["ridge"])
    assert much.ridge < start.ridge
    assert much.dense_ridge == little.dense_ridge == 1.0


def test_a_target_of_noise_is_not_followed_and_a_true_one_is():
    x, W = data(tokens=300)
    g = torch.Generator().manual_seed(4)
    noise, true = torch.randn(300, 7, generator=g), x @ torch.randn(7, 24, generator=g).T

    def chosen(y):
        folds = [gathered(x[i::2], y[i::2]) for i in range(2)]
        start = Ridges(1.0, 100.0)
        return validated(folds, W, torch.arange(24), True, start, ["ridge", "dense_ridge"])

    assert chosen(noise).dense_ridge > 100 > chosen(true).dense_ridge


def test_parts_add_up_to_the_sums_over_all_tokens():
    x, W = data()
    y = x @ W.T
    w = torch.rand(len(x), generator=torch.Generator().manual_seed(2))
    whole, parts = gathered(x, y, w), [gathered(x[i::2], y[i::2], w[i::2]) for i in range(2)]
    together = added(parts)
    for name in ("gram", "cross", "sum_x", "sum_y"):
        torch.testing.assert_close(
            getattr(together, name), getattr(whole, name), rtol=1e-4, atol=1e-3
        )
    assert together.tokens == whole.tokens
    assert float(together.total) == pytest.approx(float(whole.total))


def test_the_host_waits_for_the_factor_and_for_the_error():
    x, W = data(seed=0)
    with other_device() as waits:
        there = [GramStatistics(24, device=DEVICE) for _ in range(2)]
        for stats, part in zip(there, x.chunk(2), strict=True):
            stats.add(part.to(DEVICE))
        error = held_out_error(*there, W.to(DEVICE), KEPT.to(DEVICE), True, Ridges(50.0, 0.0))
        assert sum(waits.values()) == 2
    fit, test = (sums(part) for part in x.chunk(2))
    assert error == held_out_error(fit, test, W, KEPT, True, Ridges(50.0, 0.0))
