"""Ridge regression from streamed sums, in float64: the best linear map from what remains."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prunekit.activations.gram import GramStatistics
from prunekit.errors import ConfigError

ROUNDING = 1e-6
"""Error of a float32 sum relative to its largest terms; a ridge below it would leave the matrix
without a Cholesky factor.
"""


def cholesky(H: Tensor) -> Tensor:
    """Lower Cholesky factor of `H (..., n, n)`. Raises ConfigError where there is none: numbers
    that are not finite, or too little text.
    """
    L: Tensor
    L, failed = torch.linalg.cholesky_ex(H)
    if failed.any():
        if not H.isfinite().all():
            raise ConfigError(
                "a gram matrix has numbers that are not finite: the model overflows on this text, "
                "try pruner.precision=model"
            )
        raise ConfigError(
            f"a gram matrix of {H.shape[-1]} inputs is not positive definite: raise the ridge "
            "or calibrate on more text"
        )
    return L


@dataclass(frozen=True)
class LeastSquares:
    """Least squares with the map `best (outputs, inputs)` as its solution: `min_A tr((A - best)
    gram (A - best)^T)`, in float64.

    `gram` has its ridge. With `affine`, maps have a bias that makes the mean output `mean_y`; sums
    are centred then.
    """

    gram: Tensor
    best: Tensor
    mean_x: Tensor
    mean_y: Tensor
    affine: bool

    def solve(self, kept: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weights `(outputs, kept inputs)` and bias of the best map from the inputs `kept`
        (indices) alone.
        """
        A = torch.cholesky_solve(
            self.gram[kept] @ self.best.T, cholesky(self.gram[kept][:, kept])
        ).T
        return A, self.mean_y - A @ self.mean_x[kept] if self.affine else None

    def inverse(self) -> Tensor:
        """Inverse of the gram matrix with its ridge."""
        return torch.cholesky_inverse(cholesky(self.gram))


def prior_ridge(inputs: int) -> float:
    """A ridge in tokens to begin with: four for every input."""
    return 4.0 * inputs


def ridge_problem(
    stats: GramStatistics, weight: Tensor, ridge: float, affine: bool, dense_ridge: float = 32768
) -> LeastSquares:
    """The regression around a module's weights `(outputs, inputs)`: what they put out, plus the `y`
    of the sums, if those were taken.

    Ridges are numbers of tokens: that of an input weighs as much as so many tokens in which it
    varies as usual and alone, so that it loses its hold as the text grows. `ridge` holds the map
    near the weights as they are, `dense_ridge` what is fitted to `y`, which says how far the output
    should move from there.
    """
    H, best = stats.gram.double(), weight.double()
    mean_x = stats.sum_x.double() / stats.total
    mean_y = best @ mean_x
    if affine:
        H = H - stats.total * torch.outer(mean_x, mean_x)
    # of the sums as they were taken: centring cancels most of a large mean
    floor = ROUNDING * stats.gram.double().diagonal().max()

    def with_ridge(tokens: float) -> Tensor:
        if not tokens:
            return H
        alone = (H.diagonal() * (tokens / stats.tokens)).clamp(min=floor)
        return H + torch.diag(alone)

    if stats.cross.shape[1]:
        C, shift = stats.cross.double(), stats.sum_y.double() / stats.total
        C = C - stats.total * torch.outer(mean_x, shift) if affine else C
        best = best + torch.cholesky_solve(C, cholesky(with_ridge(dense_ridge))).T
        mean_y = mean_y + shift
    return LeastSquares(with_ridge(ridge), best, mean_x, mean_y, affine)
