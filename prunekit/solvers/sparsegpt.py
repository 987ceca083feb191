"""SparseGPT's solver (Frantar & Alistarh, ICML 2023, arXiv 2301.00774): zero elements of a matrix
column by column, from left to right, and let the columns to the right make up for each in closed
form. Tensors in, tensors out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from prunekit.errors import ConfigError
from prunekit.selection.elements import drop_lowest, of_each_run

log = logging.getLogger("prunekit")

MaskRule = Callable[[int, Callable[[], Tensor]], Tensor | None]
"""`rule(j, saliency)` at each column j: the mask `(k, outputs)` of what stays in the next k
columns, or None to go on with the mask there is. `saliency()` gives the saliencies `(n, outputs)`
of columns j to the end of the block as they are now.
"""

TRIES = 6
"""Ridges, each ten times the one before it."""


def inverse_factor(gram: Tensor, ridge: float, name: str) -> tuple[Tensor, float]:
    """Upper `U` with `U^T U = (gram + ridge * mean(diag) * I)^-1`, in float64, and the ridge that
    it took.

    Inputs that are always zero get a one on the diagonal. Where rounding leaves no factor the
    ridge grows tenfold, which is logged as a warning. Raises ConfigError when that does not help.
    """
    H = gram.double().clone()
    diagonal = H.diagonal()
    dead = diagonal == 0
    mean = torch.where(dead.all(), 1.0, diagonal.sum() / (~dead).sum())
    diagonal.copy_(torch.where(dead, mean, diagonal))
    for _ in range(TRIES):
        ridged = H + ridge * mean * torch.eye(len(H), dtype=H.dtype, device=H.device)
        lower, failed = torch.linalg.cholesky_ex(ridged)
        if not failed:  # or else its inverse may be an error of its own
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if bool((failed == 0) & upper.isfinite().all()):
                return upper, ridge
        more = max(10 * ridge, 1e-4)
        log.warning(
            "%s: the inputs' gram matrix has no Cholesky factor at ridge %g; trying again with %g",
            name,
            ridge,
            more,
        )
        ridge = more
    raise ConfigError(
        f"{name}: no Cholesky factor even at ridge {ridge}: calibrate on more text, or with "
        "model.dtype=float32"
    )


@torch.no_grad()
def solve_columns(
    weight: Tensor, upper: Tensor, rule: MaskRule, block: int, dead: Tensor | None = None
) -> tuple[Tensor, Tensor, float]:
    """New weights, the mask of what stays, both `(outputs, inputs)`, and what it cost: `tr((W - W')
    H (W - W')^T)`.

    `upper` is `inverse_factor`'s, in the weights' dtype. Saliency is `w^2 / U_jj^2`, the cost when
    only columns to the right may still make up; 0 for `dead` inputs (a bool mask). Work is done in
    blocks of `block` columns; the result for a given mask does not depend on it.
    """
    W = weight.T.clone()  # (inputs, outputs): columns lie together
    kept = torch.ones_like(W, dtype=torch.bool)
    diagonal = upper.diagonal().clone()
    scale = diagonal.square().reciprocal()
    if dead is not None:
        scale = scale.masked_fill(dead, 0)
    cost = torch.zeros((), dtype=torch.float64, device=W.device)

    def saliencies(j: int, stop: int) -> Tensor:
        return W[j:stop].square() * scale[j:stop, None]

    for start in range(0, len(W), block):
        stop = min(start + block, len(W))
        errors = torch.zeros_like(W[start:stop])
        for j in range(start, stop):
            found = rule(j, partial(saliencies, j, stop))
            if found is not None:
                kept[j : j + len(found)] = found
            errors[j - start] = W[j].masked_fill(kept[j], 0) / diagonal[j]
            W[j + 1 : stop].addr_(upper[j, j + 1 : stop], errors[j - start], alpha=-1)
            W[j].masked_fill_(~kept[j], 0)
        W[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
        cost += errors.double().square().sum()
    return W.T.contiguous(), kept.T.contiguous(), float(cost)


def lowest_of_block(count: int, inputs: int, block: int) -> MaskRule:
    """The lowest saliencies of each block, rows together; blocks share `count` by their width, so
    that the total is exact.
    """

    def choose(j: int, saliency: Callable[[], Tensor]) -> Tensor | None:
        if j % block:
            return None
        s = saliency()
        n = count * (j + len(s)) // inputs - count * j // inputs
        return drop_lowest(s.T.reshape(1, -1), n).view(s.shape[1], -1).T

    return choose


def highest_of_runs(kept: int, m: int) -> MaskRule:
    """The `kept` highest of each run of `m` inputs stay, chosen when the sweep reaches the
    run. The block must be a multiple.
    """

    def choose(j: int, saliency: Callable[[], Tensor]) -> Tensor | None:
        return None if j % m else of_each_run(saliency()[:m].T, kept, m).T

    return choose
