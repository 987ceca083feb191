"""ADMM's iteration against the formula written plainly, the authors' numbers, and the least squares
that it converges to.
"""

from __future__ import annotations

import pytest
import torch
from paths import authors_numbers
from regressions import best_within, layer

from prunekit.errors import ConfigError
from prunekit.selection.elements import per_matrix, per_row
from prunekit.solvers.admm import admm, cubic, fixed, lowest_outside_runs
from prunekit.solvers.preconditioning import squared_error
from prunekit.solvers.sparsegpt import inverse_factor, solve_columns


def ridged(gram, damp=0.1):
    """The gram matrix whose error the iteration reduces: each diagonal element a tenth larger."""
    return (gram + damp * torch.diag(gram.diagonal())).double()


def plainly(W, gram, masks, damp=0.1):
    """The formula with inputs first, as the paper writes it; `masks` one an iteration."""
    norms = gram.diagonal().sqrt()
    A = gram / torch.outer(norms, norms)
    A = A + damp * torch.eye(len(A))
    V0 = (W * norms).T
    B = torch.linalg.inv(A + torch.eye(len(A)))
    V, U = V0, torch.zeros_like(V0)
    for mask in masks:
        Z = mask.T * (V + U)
        U = U + V - Z
        V = B @ (A @ V0 + Z - U)
    return (masks[-1].T * (V + U)).T / norms


@pytest.fixture(scope="module")
def golden():
    return authors_numbers("admm")


HALF, MORE = 48 * 64 // 2, int(0.7 * 48 * 64)
LAST = {"select": lambda scores, count: per_matrix(scores, HALF)}
"""The released code chooses by the final count at every iteration of the matrix-wide branch."""


@pytest.mark.parametrize(
    ("key", "select", "count", "options"),
    [
        ("wanda_matrix_50", per_matrix, HALF, {"iterations": 0, "reselect": 0}),
        ("wanda_matrix_70", per_matrix, MORE, {"iterations": 0, "reselect": 0}),
        ("admm1_matrix_50", per_matrix, HALF, {"reselect": 0}),
        ("admm1_matrix_70", per_matrix, MORE, {"reselect": 0}),
        ("admm1_row_50", per_row, HALF, {"reselect": 0}),
        ("admm1_row_70", per_row, MORE, {"reselect": 0}),
        ("admm1_24", lowest_outside_runs(2, 4), HALF, {"reselect": 0}),
        ("admm1_matrix_50_iters200", per_matrix, HALF, {"reselect": 0, "iterations": 200}),
        ("admm1_matrix_50_damp0", per_matrix, HALF, {"reselect": 0, "ridge": 0.0}),
        ("grad_matrix_50", LAST["select"], HALF, {}),
        ("grad_matrix_50_damp001", LAST["select"], HALF, {"ridge": 0.01}),
        ("grad_matrix_50_it5_10", LAST["select"], HALF, {"iterations": 10, "reselect": 5}),
        ("grad_matrix_50_schedule_used", per_matrix, HALF, {}),
        ("grad_row_50", per_row, HALF, {}),
        ("grad_row_70", per_row, MORE + 1, {}),  # theirs floors share * inputs at every iteration
        ("grad_24", lowest_outside_runs(2, 4), HALF, {}),
    ],
)
def test_the_authors_numbers(golden, key, select, count, options):
    new, mask = admm(golden["W"], golden["XX"], select, count, **options)
    expected = golden[f"new_{key}"]
    assert torch.equal(mask, expected != 0)
    torch.testing.assert_close(new, expected, rtol=0, atol=1e-5 * float(golden["W"].abs().max()))


def test_the_authors_numbers_with_dead_inputs(golden):
    gram = golden["XX"].clone()
    gram[:4] = gram[:, :4] = 0
    new, _ = admm(golden["W"], gram, LAST["select"], HALF)
    expected = golden["new_grad_matrix_50_dead4"]
    torch.testing.assert_close(new, expected, rtol=0, atol=1e-5 * float(golden["W"].abs().max()))


def test_the_formula_written_plainly_for_a_mask_that_grows():
    W, gram = layer()
    masks = []

    def select(scores, count):
        masks.append(per_matrix(scores, count))
        return masks[-1]

    new, mask = admm(W, gram, select, 72, iterations=6, reselect=4)
    assert [int((~m).sum()) for m in masks[1:]] == [41, 63, 70, 72]
    masks = [*masks[1:], mask, mask]
    torch.testing.assert_close(new, plainly(W, gram, masks), rtol=1e-4, atol=1e-5)


def test_the_schedule_is_cubic_and_ends_at_the_count():
    assert [cubic(1000, t, 5) for t in range(1, 6)] == [488, 784, 936, 992, 1000]
    assert cubic(7, 15, 15) == 7


def test_a_fixed_mask_converges_to_the_least_squares_solution():
    W, gram = layer()
    mask = per_matrix(W.abs(), 72)
    best = best_within(W, ridged(gram), mask)
    gaps = [
        float((admm(W, gram, fixed(mask), 72, iterations=n, reselect=0)[0] - best).abs().max())
        for n in (5, 20, 400)
    ]
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-4


@pytest.mark.parametrize("seed", range(5))
def test_for_one_mask_nearer_than_sparsegpt_and_zeroing(seed):
    W, gram = layer(seed)
    H = gram + 0.01 * gram.diagonal().mean() * torch.eye(24)
    mask = per_matrix(W.abs() * gram.diagonal().sqrt(), 72)
    new, _ = admm(W, gram, fixed(mask), 72, iterations=300, reselect=0, ridge=0.01)
    swept, _, _ = solve_columns(
        W, inverse_factor(gram, 0.01, "w")[0].float(), lambda j, _: mask.T[j : j + 1], 24
    )
    errors = [squared_error(W, x, H) for x in (new, swept, W * mask)]
    assert errors[0] < errors[1] < errors[2]


def test_choosing_anew_is_better_than_the_first_mask():
    total = torch.zeros(2)
    for seed in range(8):
        W, gram = layer(seed)
        for i, reselect in enumerate((15, 0)):
            new, _ = admm(W, gram, per_matrix, 72, reselect=reselect)
            total[i] += squared_error(W, new, gram)
    assert total[0] < total[1]


@pytest.mark.parametrize("count", [0, 1, 71, 72, 143, 144])
def test_counts_are_exact(count):
    W, gram = layer()
    new, mask = admm(W, gram, per_matrix, count)
    assert int((~mask).sum()) == count == int((new == 0).sum())


def test_every_row_loses_as_many():
    W, gram = layer()
    _, mask = admm(W, gram, per_row, 72)
    assert (mask.sum(1) == 12).all()


@pytest.mark.parametrize(("kept", "length"), [(2, 4), (4, 8), (1, 4), (3, 4), (5, 12)])
def test_patterns_of_any_length_hold(kept, length):
    W, gram = layer()
    _, mask = admm(W, gram, lowest_outside_runs(kept, length), 144 * (length - kept) // length)
    assert (mask.view(6, -1, length).sum(-1) == kept).all()


def test_a_pattern_grows_from_the_lowest_that_may_go():
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0, 8.0, 7.0, 0.5, 6.0]])
    gone = [(~lowest_outside_runs(2, 4)(scores, n)).nonzero()[:, 1].tolist() for n in range(5)]
    assert gone == [[], [6], [3, 6], [2, 3, 6], [2, 3, 6, 7]]


def test_nothing_to_remove_changes_nothing():
    W, gram = layer()
    torch.testing.assert_close(admm(W, gram, per_matrix, 0)[0], W, rtol=1e-5, atol=1e-6)


def test_the_scale_of_the_inputs_does_not_matter():
    W, gram = layer()
    once = admm(W, gram, per_matrix, 72)[0]
    torch.testing.assert_close(admm(W, gram * 1e6, per_matrix, 72)[0], once)


def test_weights_of_inputs_that_are_always_zero_go_first_and_otherwise_stay():
    W, gram = layer()
    gram[3] = gram[:, 3] = 0
    _, mask = admm(W, gram, per_matrix, 10)
    assert not mask[:, 3].any()
    new, _ = admm(W, gram, per_row, 6 * 12)
    assert torch.isfinite(new).all()
    new, _ = admm(W, gram, fixed(torch.arange(24).expand(6, 24) < 12), 72)
    torch.testing.assert_close(new[:, 3], W[:, 3])


def test_inputs_without_a_factor_are_refused_by_name():
    with pytest.raises(ConfigError, match="weights.0.q_proj.*no Cholesky factor"):
        admm(
            torch.ones(2, 4), torch.full((4, 4), torch.nan), per_matrix, 4, name="weights.0.q_proj"
        )
