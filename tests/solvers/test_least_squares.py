"""Ridge regression from streamed sums against torch's least squares."""

from __future__ import annotations

import pytest
import torch
from regressions import data, gathered

from prunekit.activations.gram import GramStatistics
from prunekit.errors import ConfigError
from prunekit.solvers.least_squares import ridge_problem


@pytest.mark.parametrize("weighted", [False, True])
def test_kept_weights_are_the_least_squares_map(weighted):
    x, W = data()
    y = x @ W.T
    w = torch.rand(len(x), generator=torch.Generator().manual_seed(2)) if weighted else None
    columns = torch.arange(0, 24, 2)
    A, b = ridge_problem(gathered(x, y - x @ W.T, w), W, ridge=1e-10, affine=True).solve(columns)
    root = (w if weighted else torch.ones(len(x))).double().sqrt()[:, None]
    ones = torch.cat([x.double()[:, columns], torch.ones(len(x), 1, dtype=torch.double)], 1)
    expected = torch.linalg.lstsq(ones * root, y.double() * root).solution
    torch.testing.assert_close(A, expected[:-1].T, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(b, expected[-1], rtol=1e-3, atol=1e-3)


def test_without_targets_the_weights_are_the_solution():
    x, W = data()
    stats = GramStatistics(24)
    stats.add(x)
    A, b = ridge_problem(stats, W, ridge=0.01, affine=False).solve(torch.arange(24))
    torch.testing.assert_close(A, W.double(), rtol=1e-6, atol=1e-6)
    assert b is None


def test_a_strong_ridge_keeps_the_repair_small():
    x, W = data()
    y = x @ torch.randn(7, 24, generator=torch.Generator().manual_seed(3)).T
    moved = [
        float((ridge_problem(gathered(x, y), W, 0.01, True, dense_ridge=r).best - W).norm())
        for r in (1e-6, 1.0, 100.0)
    ]
    assert moved[0] > moved[1] > moved[2]


def test_the_ridge_of_the_repair_weighs_as_many_tokens_as_it_says():
    """With orthonormal inputs a target is followed by N / (N + dense_ridge)."""
    x = torch.eye(24).repeat(10, 1)
    W = torch.zeros(7, 24)
    y = x @ torch.ones(7, 24).T
    followed = ridge_problem(gathered(x, y), W, 1e-9, False, dense_ridge=60).best
    torch.testing.assert_close(followed, torch.full((7, 24), 240 / 300, dtype=torch.double))


def test_numbers_that_are_not_finite_are_refused():
    x, W = data()
    x[3, 5] = float("inf")
    stats = GramStatistics(24)
    stats.add(x)
    with pytest.raises(ConfigError, match="not finite"):
        ridge_problem(stats, W, ridge=0.01, affine=False).inverse()


def test_a_singular_gram_is_refused_with_a_hint():
    stats = GramStatistics(3)
    stats.add(torch.tensor([[1.0, 1.0, 1.0]]))
    with pytest.raises(ConfigError, match="raise the ridge"):
        ridge_problem(stats, torch.ones(2, 3), ridge=0.0, affine=False).inverse()
