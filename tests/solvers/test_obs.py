"""The brain surgeon's formulas against plain references on small matrices."""

from __future__ import annotations

import pytest
import torch
from regressions import data, gathered

from prunekit.activations.gram import GramStatistics
from prunekit.solvers.least_squares import ridge_problem
from prunekit.solvers.obs import greedy_removal


def plain_removal(W, H, units, count):
    """The formulas of `solvers.obs`, step by step with explicit inverses."""
    W, M = W.double().clone(), torch.linalg.inv(H.double())
    left, order, costs = list(range(len(units))), [], []
    for _ in range(count):
        trial = {
            u: torch.trace(
                W[:, units[u]] @ torch.linalg.inv(M[units[u]][:, units[u]]) @ W[:, units[u]].T
            ).item()
            for u in left
        }
        u = min(trial, key=trial.get)
        S = units[u]
        share = torch.linalg.inv(M[S][:, S]) @ M[S]
        W, M = W - W[:, S] @ share, M - M[:, S] @ share
        for i in S.tolist():  # keep the inverse usable: removed inputs decouple
            M[i], M[:, i], M[i, i], W[:, i] = 0, 0, 1, 0
        left.remove(u)
        order.append(u)
        costs.append(trial[u])
    return order, costs, W


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("count", [1, 5, 7])
def test_removal_follows_the_formula(width, count):
    x, W = data()
    H = (x.T @ x).double() + 0.1 * torch.eye(24, dtype=torch.double)
    units = torch.arange(24).view(-1, width)
    order, costs = greedy_removal(W, torch.linalg.inv(H), units, count)
    expected, prices, _ = plain_removal(W, H, units, count)
    assert order == expected
    torch.testing.assert_close(torch.tensor(costs), torch.tensor(prices), rtol=1e-3, atol=1e-2)


def test_all_units_of_a_large_matrix_go_in_panels():
    x, W = data(tokens=900, inputs=100)
    H = (x.T @ x).double() + torch.eye(100, dtype=torch.double)
    order, costs = greedy_removal(W, torch.linalg.inv(H), torch.arange(100)[:, None], 100)
    expected, prices, _ = plain_removal(W, H, torch.arange(100)[:, None], 100)
    assert order == expected
    torch.testing.assert_close(torch.tensor(costs), torch.tensor(prices), rtol=1e-3, atol=1e-1)


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("affine", [False, True])
def test_error_after_the_update_is_the_sum_of_costs(width, affine):
    x, W = data()
    y = x @ W.T + 1.5 + 0.3 * torch.randn(len(x), 7, generator=torch.Generator().manual_seed(1))
    task = ridge_problem(gathered(x, y - x @ W.T), W, ridge=1e-9, affine=affine, dense_ridge=1e-9)
    full, b0 = task.solve(torch.arange(24))
    units = torch.arange(24).view(-1, width)
    order, costs = greedy_removal(full.float(), task.inverse(), units, 12 // width)
    kept = torch.ones(len(units), dtype=torch.bool)
    kept[order] = False
    columns = units[kept].flatten()
    A, b = task.solve(columns)

    def error(out):
        return (y.double() - out).square().sum().item()

    before = error(x.double() @ full.T + (0 if b0 is None else b0))
    after = error(x.double()[:, columns] @ A.T + (0 if b is None else b))
    assert after - before == pytest.approx(sum(costs), rel=1e-3)


@pytest.mark.parametrize("bf16", [False, True])
def test_large_means_leave_a_centred_gram_positive(bf16):
    stats = GramStatistics(24, bf16=bf16)
    for seed in range(4):
        x, W = data(seed=seed)
        x[0] *= 1000  # an attention sink
        stats.add(x + 300, w=1 / x.square().mean(1))
    H = ridge_problem(stats, W, ridge=0.01, affine=True).inverse()
    order, costs = greedy_removal(W, H, torch.arange(24).view(-1, 3), 7)
    assert len(set(order)) == 7
    assert all(c >= 0 for c in costs)
