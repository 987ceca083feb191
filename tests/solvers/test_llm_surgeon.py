"""Costs and updates of rows and columns against the quadratic form itself, solved with explicit
Kronecker products.
"""

from __future__ import annotations

import pytest
import torch

from prunekit.solvers.llm_surgeon import column_costs, damped_inverse, without_columns

OUT, IN = 5, 12


def draw():
    """A matrix, and both factors of its curvature; float64."""
    rng = torch.Generator().manual_seed(0)
    x, g = (torch.randn(40, n, generator=rng, dtype=torch.double) for n in (IN, OUT))
    mix = torch.randn(IN, IN, generator=rng, dtype=torch.double)
    W = torch.randn(OUT, IN, generator=rng, dtype=torch.double)
    return W, (x @ mix).T @ (x @ mix) / 40, g.T @ g / 40


def cheapest_without(W, A, G, gone):
    """The change of least `vec(D)^T (G (x) A) vec(D) / 2` that takes the columns `gone` to zero,
    by Lagrange multipliers on the whole matrix, and that number.
    """
    F = torch.kron(G, A)
    fixed = torch.zeros(OUT, IN, dtype=torch.bool)
    fixed[:, gone] = True
    E = torch.eye(W.numel(), dtype=torch.double)[fixed.flatten()]
    Finv = torch.linalg.inv(F)
    D = -Finv @ E.T @ torch.linalg.solve(E @ Finv @ E.T, W[fixed])
    return W + D.view(OUT, IN), float(D @ F @ D / 2)


@pytest.mark.parametrize("width", [1, 3])
def test_a_unit_costs_the_least_that_the_quadratic_form_allows(width):
    W, A, G = draw()
    units = torch.arange(IN).view(-1, width)
    costs = column_costs(W, torch.linalg.inv(A), G, units)
    plain = [cheapest_without(W, A, G, unit)[1] for unit in units]
    torch.testing.assert_close(costs, torch.tensor(plain, dtype=torch.double))


def test_all_that_go_are_made_up_for_together():
    W, A, G = draw()
    gone = torch.tensor([1, 4, 5, 11])
    after = without_columns(W, torch.linalg.inv(A), gone)
    torch.testing.assert_close(after, cheapest_without(W, A, G, gone)[0])
    assert (after[:, gone] == 0).all()


def test_without_gradients_of_their_own_it_is_least_squares():
    """G = I: the kept columns are the best map from the kept inputs to the old outputs."""
    W, A, _ = draw()
    gone, kept = torch.tensor([0, 7]), torch.tensor([i for i in range(IN) if i not in (0, 7)])
    after = without_columns(W, torch.linalg.inv(A), gone)
    best = torch.linalg.solve(A[kept][:, kept], A[kept] @ W.T).T
    torch.testing.assert_close(after[:, kept], best)
    [cost] = column_costs(W, torch.linalg.inv(A), torch.eye(OUT), gone[None])
    error = torch.trace((after - W) @ A @ (after - W).T)
    torch.testing.assert_close(cost, error / 2)


def test_without_any_curvature_it_is_magnitude():
    W, _, _ = draw()
    costs = column_costs(W, torch.eye(IN).double(), torch.eye(OUT), torch.arange(IN)[:, None])
    torch.testing.assert_close(costs, W.square().sum(0) / 2)


def test_the_ridge_is_a_share_of_the_mean_diagonal():
    _, A, _ = draw()
    plain = torch.linalg.inv(A + 0.1 * A.diagonal().mean() * torch.eye(IN))
    torch.testing.assert_close(damped_inverse(A, 0.1), plain)


def test_channels_with_nothing_in_them_leave_the_others_as_they_are():
    _, A, _ = draw()
    wide = torch.zeros(IN + 3, IN + 3, dtype=torch.double)
    wide[:IN, :IN] = A
    inverse = damped_inverse(wide, 0.1)
    torch.testing.assert_close(inverse[:IN, :IN], damped_inverse(A, 0.1))
    assert (inverse[:IN, IN:] == 0).all()
    assert damped_inverse(torch.zeros(3, 3), 0.1).isfinite().all()
