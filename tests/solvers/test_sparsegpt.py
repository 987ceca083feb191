"""SparseGPT's sweep against what its derivation says: closed forms, the loss identity, and
independence of the block size.
"""

from __future__ import annotations

import logging

import pytest
import torch

from prunekit.errors import ConfigError
from prunekit.selection.elements import drop_lowest, per_row
from prunekit.solvers.sparsegpt import (
    highest_of_runs,
    inverse_factor,
    lowest_of_block,
    solve_columns,
)


def problem(seed=0, outputs=6, inputs=24, tokens=80):
    """Weights, correlated inputs, their mean gram matrix and its factor, float64."""
    rng = torch.Generator().manual_seed(seed)
    W = torch.randn(outputs, inputs, generator=rng, dtype=torch.float64)
    mix = torch.randn(inputs, inputs, generator=rng, dtype=torch.float64)
    X = torch.randn(tokens, inputs, generator=rng, dtype=torch.float64) @ mix
    gram = X.T @ X / tokens
    U, _ = inverse_factor(gram, 0.01, "w")
    return W, X, gram, U


def ridged(gram, ridge=0.01):
    return gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def fixed(mask):
    """A rule that knows the whole mask `(outputs, inputs)` from the start."""
    return lambda j, _saliency: None if j else mask.T


def mask_of(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def test_the_factor_says_what_removal_costs_once_the_left_is_fixed():
    _, _, gram, U = problem()
    H = ridged(gram)
    torch.testing.assert_close(U.T @ U @ H, torch.eye(24, dtype=H.dtype))
    for j in range(24):
        torch.testing.assert_close(U[j, j] ** 2, torch.linalg.inv(H[j:, j:])[0, 0])


@pytest.mark.parametrize("block", [1, 5, 8, 23, 128])
def test_a_given_mask_has_one_result_whatever_the_block(block):
    W, _, _, U = problem()
    mask = mask_of(1, *W.shape)
    expected, _, cost = solve_columns(W, U, fixed(mask), 24)
    found, kept, again = solve_columns(W, U, fixed(mask), block)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(kept, mask)
    assert again == pytest.approx(cost)


@pytest.mark.parametrize(
    "choice", [lowest_of_block(72, 24, 8), highest_of_runs(2, 4), fixed(mask_of(2, 6, 24))]
)
def test_the_cost_is_the_loss(choice):
    W, _, gram, U = problem()
    new, kept, cost = solve_columns(W, U, choice, 8)
    D = W - new
    assert cost == pytest.approx(float(torch.trace(D @ ridged(gram) @ D.T)), rel=1e-9)
    assert (new[~kept] == 0).all()
    assert (new[kept] != 0).all()


def test_a_prefix_is_the_least_squares_solution():
    W, _, gram, U = problem()
    H, k = ridged(gram), 9
    mask = (torch.arange(24) >= k).expand(6, 24)
    new, _, _ = solve_columns(W, U, fixed(mask), 8)
    best = W[:, k:] + torch.linalg.solve(H[k:, k:], H[k:, :k] @ W[:, :k].T).T
    torch.testing.assert_close(new[:, k:], best)


def test_independent_inputs_need_no_correction():
    W, X, _, _ = problem()
    norms = X.square().mean(0)
    U, _ = inverse_factor(torch.diag(norms), 0.0, "w")
    new, kept, _ = solve_columns(W, U, lowest_of_block(72, 24, 24), 24)
    assert torch.equal(new, W * kept)
    assert torch.equal(kept, drop_lowest((W.abs() * norms.sqrt()).reshape(1, -1), 72).view(6, 24))


@pytest.mark.parametrize(("count", "block"), [(72, 8), (50, 7), (1, 24), (143, 5), (0, 8)])
def test_counts_are_exact(count, block):
    W, _, _, U = problem()
    _, kept, _ = solve_columns(W, U, lowest_of_block(count, 24, block), block)
    assert int((~kept).sum()) == count


@pytest.mark.parametrize(("keep", "length"), [(2, 4), (4, 8), (1, 4)])
def test_patterns_hold(keep, length):
    W, _, _, U = problem()
    _, kept, _ = solve_columns(W, U, highest_of_runs(keep, length), 8)
    assert (kept.view(6, -1, length).sum(-1) == keep).all()


def test_better_than_wanda_better_than_magnitude():
    totals = torch.zeros(3, dtype=torch.float64)
    for seed in range(12):
        W, X, _, U = problem(seed)
        X = X * torch.linspace(0.2, 3, 24, dtype=X.dtype)
        U, _ = inverse_factor(X.T @ X / len(X), 0.01, "w")
        ours = solve_columns(W, U, lowest_of_block(72, 24, 24), 24)[0]
        wanda = W * per_row(W.abs() * X.norm(dim=0), 72)
        magnitude = W * per_row(W.abs(), 72)
        totals += torch.stack([((W - V) @ X.T).square().sum() for V in (ours, wanda, magnitude)])
    assert totals[0] < totals[1] < totals[2]


def test_inputs_that_are_always_zero_go_first_and_change_nothing():
    W, _, gram, _ = problem()
    gram = gram.clone()
    gram[3] = gram[:, 3] = 0
    U, took = inverse_factor(gram, 0.01, "w")
    new, kept, _ = solve_columns(W, U, lowest_of_block(10, 24, 24), 24, gram.diagonal() == 0)
    assert took == 0.01
    assert torch.isfinite(new).all()
    assert not kept[:, 3].any()


def test_a_matrix_without_factor_gets_a_larger_ridge_and_says_so(caplog):
    x = torch.ones(1, 8)
    with caplog.at_level(logging.WARNING, "prunekit"):
        _, took = inverse_factor(x.T @ x - 1e-3 * torch.eye(8), 1e-9, "weights.0.q_proj")
    assert took > 1e-9
    assert "weights.0.q_proj" in caplog.text
    assert "no Cholesky factor" in caplog.text


def test_a_hopeless_matrix_is_refused():
    with pytest.raises(ConfigError, match="calibrate on more text"):
        inverse_factor(torch.full((4, 4), float("nan")), 0.01, "w")
