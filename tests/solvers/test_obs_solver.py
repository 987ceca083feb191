"""The brain surgeon's formulas against plain references on small matrices."""

from __future__ import annotations

import pytest
import torch

from prunekit.activations.gram import Normal, problem
from prunekit.errors import ConfigError
from prunekit.selection.budget import cheapest, hull
from prunekit.solvers.obs import removal


def data(tokens: int = 400, inputs: int = 24, outputs: int = 7, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=g) * 0.4 + torch.eye(inputs)
    x = torch.randn(tokens, inputs, generator=g) @ mix + torch.randn(inputs, generator=g)
    return x, torch.randn(outputs, inputs, generator=g)


def gathered(x, y, w=None) -> Normal:
    stats = Normal(x.shape[1], y.shape[1])
    for i in range(0, len(x), 90):  # several batches, the last one smaller
        stats.add(x[i : i + 90], y[i : i + 90], None if w is None else w[i : i + 90])
    return stats


def plain_removal(W, H, units, count):
    """Card B of structured.md, step by step with explicit inverses."""
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
    order, costs = removal(W, torch.linalg.inv(H), units, count)
    expected, prices, _ = plain_removal(W, H, units, count)
    assert order == expected
    torch.testing.assert_close(torch.tensor(costs), torch.tensor(prices), rtol=1e-3, atol=1e-2)


def test_all_units_of_a_large_matrix_go_in_panels():
    x, W = data(tokens=900, inputs=100)
    H = (x.T @ x).double() + torch.eye(100, dtype=torch.double)
    order, costs = removal(W, torch.linalg.inv(H), torch.arange(100)[:, None], 100)
    expected, prices, _ = plain_removal(W, H, torch.arange(100)[:, None], 100)
    assert order == expected
    torch.testing.assert_close(torch.tensor(costs), torch.tensor(prices), rtol=1e-3, atol=1e-1)


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("affine", [False, True])
def test_error_after_the_update_is_the_sum_of_costs(width, affine):
    x, W = data()
    y = x @ W.T + 1.5 + 0.3 * torch.randn(len(x), 7, generator=torch.Generator().manual_seed(1))
    task = problem(gathered(x, y - x @ W.T), W, damp=1e-9, affine=affine, repair=1e-9)
    full, b0 = task.solve(torch.arange(24))
    units = torch.arange(24).view(-1, width)
    order, costs = removal(full.float(), task.inverse(), units, 12 // width)
    kept = torch.ones(len(units), dtype=torch.bool)
    kept[order] = False
    columns = units[kept].flatten()
    A, b = task.solve(columns)

    def error(out):
        return (y.double() - out).square().sum().item()

    before = error(x.double() @ full.T + (0 if b0 is None else b0))
    after = error(x.double()[:, columns] @ A.T + (0 if b is None else b))
    assert after - before == pytest.approx(sum(costs), rel=1e-3)


@pytest.mark.parametrize("weighted", [False, True])
def test_kept_weights_are_the_least_squares_map(weighted):
    x, W = data()
    y = x @ W.T
    w = torch.rand(len(x), generator=torch.Generator().manual_seed(2)) if weighted else None
    columns = torch.arange(0, 24, 2)
    A, b = problem(gathered(x, y - x @ W.T, w), W, damp=1e-10, affine=True).solve(columns)
    root = (w if weighted else torch.ones(len(x))).double().sqrt()[:, None]
    ones = torch.cat([x.double()[:, columns], torch.ones(len(x), 1, dtype=torch.double)], 1)
    expected = torch.linalg.lstsq(ones * root, y.double() * root).solution
    torch.testing.assert_close(A, expected[:-1].T, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(b, expected[-1], rtol=1e-3, atol=1e-3)


def test_without_targets_the_weights_are_the_solution():
    x, W = data()
    stats = Normal(24)
    stats.add(x)
    A, b = problem(stats, W, damp=0.01, affine=False).solve(torch.arange(24))
    torch.testing.assert_close(A, W.double(), rtol=1e-6, atol=1e-6)
    assert b is None


def test_a_strong_ridge_keeps_the_repair_small():
    x, W = data()
    y = x @ torch.randn(7, 24, generator=torch.Generator().manual_seed(3)).T
    moved = [
        float((problem(gathered(x, y), W, 0.01, True, repair=r).best - W).norm())
        for r in (1e-6, 1.0, 100.0)
    ]
    assert moved[0] > moved[1] > moved[2]


def test_the_ridge_of_the_repair_weighs_as_many_tokens_as_it_says():
    """With orthonormal inputs a target is followed by N / (N + repair)."""
    x = torch.eye(24).repeat(10, 1)
    W = torch.zeros(7, 24)
    y = x @ torch.ones(7, 24).T
    followed = problem(gathered(x, y), W, 1e-9, False, repair=60).best
    torch.testing.assert_close(followed, torch.full((7, 24), 240 / 300, dtype=torch.double))


@pytest.mark.parametrize("bf16", [False, True])
def test_large_means_leave_a_centred_gram_positive(bf16):
    stats = Normal(24, bf16=bf16)
    for seed in range(4):
        x, W = data(seed=seed)
        x[0] *= 1000  # an attention sink
        stats.add(x + 300, w=1 / x.square().mean(1))
    H = problem(stats, W, damp=0.01, affine=True).inverse()
    order, costs = removal(W, H, torch.arange(24).view(-1, 3), 7)
    assert len(set(order)) == 7
    assert all(c >= 0 for c in costs)


def test_numbers_that_are_not_finite_are_refused():
    x, W = data()
    x[3, 5] = float("inf")
    stats = Normal(24)
    stats.add(x)
    with pytest.raises(ConfigError, match="not finite"):
        problem(stats, W, damp=0.01, affine=False).inverse()


def test_a_singular_gram_is_refused_with_a_hint():
    stats = Normal(3)
    stats.add(torch.tensor([[1.0, 1.0, 1.0]]))
    with pytest.raises(ConfigError, match="damp"):
        problem(stats, torch.ones(2, 3), damp=0.0, affine=False).inverse()


def test_hull_keeps_the_corners_only():
    assert hull([0.0, 3.0, 4.0, 9.0]) == [0, 2, 3]
    assert hull([0.0, 1.0, 2.0, 4.0]) in ([0, 2, 3], [0, 1, 2, 3])


def test_budget_goes_where_it_costs_least():
    curves = {"a": torch.tensor([1.0, 2.0, 4.0, 9.0]), "b": torch.tensor([0.5, 10.0, 30.0, 40.0])}
    assert cheapest(curves, {"a": 10, "b": 10}, 40) == {"a": 3, "b": 1}
    assert cheapest(curves, {"a": 10, "b": 10}, 39) == {"a": 2, "b": 1}
    assert cheapest(curves, {"a": 10, "b": 10}, 1000) == {"a": 3, "b": 3}, (
        "one unit of each group stays"
    )
    assert cheapest(curves, {"a": 10, "b": 10}, 0) == {"a": 0, "b": 0}
