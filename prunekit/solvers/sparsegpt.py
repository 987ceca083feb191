"""SparseGPT's sweep (Frantar & Alistarh, ICML 2023, arXiv 2301.00774): zero elements of a matrix
column by column, from left to right, and let the columns to the right make up for each in closed
form. Tensors in, tensors out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from prunekit.errors import ConfigError
from prunekit.selection.elements import lowest

log = logging.getLogger("prunekit")

Choice = Callable[[int, Tensor], Tensor | None]
"""`choice(j, saliency)` at each column j, with the saliencies `(n, outputs)` of columns j to the
end of the block as they are now: the mask `(k, outputs)` of what stays in the next k columns, or
None to go on with the mask there is.
"""

TRIES = 6


def inverse_factor(gram: Tensor, damp: float, name: str) -> tuple[Tensor, float]:
    """Upper `U` with `U^T U = (gram + damp * mean(diag) * I)^-1`, in float64, and the damping that
    it took.

    Inputs that are always zero get a one on the diagonal. Where rounding leaves no factor the
    damping grows tenfold, which is logged as a warning. Raises ConfigError when that does not help.
    """
    H = gram.double().clone()
    dead = H.diagonal() == 0
    mean = (
        H.diagonal()[~dead].mean()
        if not dead.all()
        else torch.ones((), dtype=H.dtype, device=H.device)
    )
    H.diagonal()[dead] = mean
    for _ in range(TRIES):
        damped = H + damp * mean * torch.eye(len(H), dtype=H.dtype, device=H.device)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and torch.isfinite(upper).all():
            return upper, damp
        more = max(10 * damp, 1e-4)
        log.warning(
            "%s: the inputs' gram matrix has no Cholesky factor at damping %g; trying again with "
            "%g",
            name,
            damp,
            more,
        )
        damp = more
    raise ConfigError(
        f"{name}: no Cholesky factor even at damping {damp}: calibrate on more text, or with "
        "model.dtype=float32"
    )


@torch.no_grad()
def sweep(
    weight: Tensor, upper: Tensor, choice: Choice, block: int, dead: Tensor | None = None
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
        scale[dead] = 0
    cost = 0.0
    for start in range(0, len(W), block):
        stop = min(start + block, len(W))
        errors = torch.zeros_like(W[start:stop])
        for j in range(start, stop):
            found = choice(j, W[j:stop].square() * scale[j:stop, None])
            if found is not None:
                kept[j : j + len(found)] = found
            errors[j - start] = W[j].masked_fill(kept[j], 0) / diagonal[j]
            W[j + 1 : stop].addr_(upper[j, j + 1 : stop], errors[j - start], alpha=-1)
            W[j].masked_fill_(~kept[j], 0)
        W[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
        cost += float(errors.double().square().sum())
    return W.T.contiguous(), kept.T.contiguous(), cost


def spread(count: int, inputs: int, block: int) -> Choice:
    """The lowest saliencies of each block, rows together; blocks share `count` by their width, so
    that the total is exact.
    """

    def choose(j: int, saliency: Tensor) -> Tensor | None:
        if j % block:
            return None
        n = count * (j + len(saliency)) // inputs - count * j // inputs
        return lowest(saliency.T.reshape(1, -1), n).view(saliency.shape[1], -1).T

    return choose


def runs(kept: int, block_m: int) -> Choice:
    """The `kept` highest of each run of `block_m` inputs stay, chosen when the sweep reaches the
    run. The block must be a multiple.
    """

    def choose(j: int, saliency: Tensor) -> Tensor | None:
        return None if j % block_m else lowest(saliency[:block_m].T, block_m - kept).T

    return choose


def fixed(mask: Tensor) -> Choice:
    """A mask `(outputs, inputs)` that is given."""
    return lambda j, saliency: mask.T[j : j + 1]
