"""ALPS against its formula written plainly, the least squares it ends in, and ADMM on the same
layers.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from regressions import best_within, layer

from prunekit.errors import ConfigError
from prunekit.selection.elements import per_matrix, per_row
from prunekit.solvers.admm import admm, fixed, lowest_outside_runs
from prunekit.solvers.alps import alps, conjugate_gradient
from prunekit.solvers.preconditioning import squared_error


def damped(gram, damp=0.01):
    return (gram + damp * gram.diagonal().mean() * torch.eye(len(gram))).double()


def plainly(W, gram, count, iterations, rho=0.1):
    """The formula with inputs first and float64: the dense map `B`, and the penalties it took."""
    H = damped(gram)
    norms = H.diagonal().sqrt()
    A = H / torch.outer(norms, norms)
    eye = torch.eye(len(A), dtype=A.dtype)
    B0 = (W * norms).T

    def top(x):
        order = x.abs().flatten().argsort(descending=True)
        keep = torch.zeros(x.numel(), dtype=torch.bool)
        keep[order[: x.numel() - count]] = True
        return keep.view(x.shape)

    V, D, old, used = torch.zeros_like(B0), B0 * top(B0), top(B0), [rho]
    for t in range(1, iterations + 1):
        B = torch.linalg.inv(A + rho * eye) @ (A @ B0 - V + rho * D)
        keep = top(B + V / rho)
        D = (B + V / rho) * keep
        V = V + rho * (B - D)
        if t % 3 == 0:
            changed = int((keep != old).sum()) / int(keep.sum())
            if changed == 0:
                break
            rho *= 1.3 if changed > 0.1 else 1.2 if changed > 0.005 else 1.1
            used.append(rho)
            old = keep
    return (B * top(B)).T / norms, top(B).T, used


@pytest.mark.parametrize("seed", range(4))
def test_the_formula_written_plainly(seed):
    W, gram = layer(seed)
    new, mask = alps(W, gram, per_matrix, 72, iterations=12, cg_steps=0)
    expected, kept, used = plainly(W, gram, 72, 12)
    assert len(set(used)) > 2
    assert torch.equal(mask, kept)
    torch.testing.assert_close(new.double(), expected, rtol=1e-4, atol=1e-5)


def test_it_stops_when_the_mask_rests():
    W, gram = layer()
    counts = []

    def select(scores, count):
        counts.append(count)
        return per_matrix(scores, count)

    alps(W, gram, select, 72, iterations=3000)
    assert len(counts) < 1000


def test_many_steps_of_conjugate_gradients_are_the_least_squares_solution():
    W, gram = layer()
    new, mask = alps(W, gram, per_matrix, 72, cg_steps=100)
    best = best_within(W, damped(gram), mask)
    torch.testing.assert_close(new.double(), best, rtol=1e-3, atol=1e-4)


def test_each_step_of_conjugate_gradients_lowers_every_rows_error():
    W, gram = layer()
    H = damped(gram).float()
    mask = per_matrix(W.abs(), 72)
    errors = []
    for steps in range(6):
        gap = conjugate_gradient(H, W @ H, W * mask, mask, steps) - W
        errors.append(((gap @ H) * gap).sum(1))
    assert all((b < a + 1e-5).all() for a, b in itertools.pairwise(errors))
    assert (errors[-1] < 0.9 * errors[0]).all()


def test_a_row_that_is_solved_stays():
    W, gram = layer()
    mask = torch.ones_like(W, dtype=torch.bool)
    mask[0] = False
    out = conjugate_gradient(gram, W @ gram, W * mask, mask, 50)
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out[1:], W[1:], rtol=1e-4, atol=1e-4)
    assert (out[0] == 0).all()


@pytest.mark.parametrize("share", [0.5, 0.7])
def test_smaller_errors_than_admm(share):
    total = torch.zeros(2)
    for seed in range(8):
        W, gram = layer(seed, outputs=16, inputs=32)
        count = int(share * W.numel())
        for i, method in enumerate((alps, admm)):
            total[i] += squared_error(W, method(W, gram, per_matrix, count)[0], gram)
    assert total[0] < total[1]


@pytest.mark.parametrize("count", [0, 1, 71, 72, 143, 144])
def test_counts_are_exact(count):
    W, gram = layer()
    new, mask = alps(W, gram, per_matrix, count)
    assert int((~mask).sum()) == count == int((new == 0).sum())


def test_every_row_loses_as_many():
    W, gram = layer()
    assert (alps(W, gram, per_row, 72)[1].sum(1) == 12).all()


@pytest.mark.parametrize(("kept", "length"), [(2, 4), (4, 8), (1, 4), (5, 12)])
def test_patterns_hold(kept, length):
    W, gram = layer()
    _, mask = alps(W, gram, lowest_outside_runs(kept, length), 144 * (length - kept) // length)
    assert (mask.view(6, -1, length).sum(-1) == kept).all()


def test_nothing_to_remove_changes_nothing():
    W, gram = layer()
    torch.testing.assert_close(alps(W, gram, per_matrix, 0)[0], W, rtol=1e-4, atol=1e-5)


def test_a_mask_that_is_given_stays():
    W, gram = layer()
    mask = per_matrix(W.abs(), 72)
    assert torch.equal(alps(W, gram, fixed(mask), 72)[1], mask)


def test_weights_of_inputs_that_are_always_zero_go_first():
    W, gram = layer()
    gram[3] = gram[:, 3] = 0
    new, mask = alps(W, gram, per_matrix, 60)
    assert torch.isfinite(new).all()
    assert not mask[:, 3].any()


def test_inputs_without_a_factor_are_refused_by_name():
    with pytest.raises(ConfigError, match="weights.0.q_proj.*no Cholesky factor"):
        alps(
            torch.ones(2, 4), torch.full((4, 4), torch.nan), per_matrix, 4, name="weights.0.q_proj"
        )
