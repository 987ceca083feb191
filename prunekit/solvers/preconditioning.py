"""Inputs of a linear map brought to the same scale, so that the size of a weight says what it does
to the output. Tensors in, tensors out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit.errors import ConfigError

DEAD = 1e-8
"""Norm of an input that is always zero, in units of the mean norm: its weights rank lowest, and one
that stays is as it was.
"""


def unit_diagonal(gram: Tensor) -> tuple[Tensor, Tensor]:
    """`A = D^-1 gram D^-1` with ones on the diagonal, and `D`'s diagonal `(inputs,)`, the norms of
    the inputs; float64.

    An input that is always zero keeps its zeros in `A`.
    """
    H = gram.double()
    norms = H.diagonal().clamp(min=0).sqrt()
    dead = norms == 0
    scale = norms.sum() / (~dead).sum().clamp(min=1)
    norms = norms.masked_fill(dead, 0) + dead * torch.where(scale > 0, DEAD * scale, 1.0)
    return H / norms / norms[:, None], norms


def inverse(matrix: Tensor, name: str) -> Tensor:
    """Inverse of a symmetric positive matrix. Raises ConfigError, naming the weights' matrix, where
    there is no Cholesky factor.
    """
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if not failed:  # or else the inverse is an error of its own where a pivot is exactly zero
        found = torch.cholesky_inverse(lower)
        if found.isfinite().all():
            return found
    raise ConfigError(
        f"{name}: no Cholesky factor of the {len(matrix)} inputs' gram matrix: numbers that "
        "are not finite, or too little text for this ridge. Raise pruner.ridge, calibrate on "
        "more text, or with model.dtype=float32"
    )


def squared_error(weight: Tensor, new: Tensor, gram: Tensor) -> float:
    """`tr((W - W') gram (W - W')^T)`: the squared error of the output, summed over outputs."""
    gap = weight.double() - new.double()
    return float(((gap @ gram.to(gap)) * gap).sum())
