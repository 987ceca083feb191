"""Normal equations of a linear module, streamed: `H = sum_t w_t x_t x_t^T` and `C = sum_t w_t x_t
y_t^T`, and what follows from them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from prunekit.solvers.obs import factor

log = logging.getLogger("prunekit")

ROUNDING = 1e-6
"""Error of a float32 sum relative to its largest terms; a ridge below it would leave the matrix
without a Cholesky factor.
"""


class Normal:
    """Sums over tokens of a module's inputs `x (inputs)` and of the outputs `y (outputs)` it should
    give, float32 on the inputs' device.

    Tokens may have weights; `weight` is their sum, `tokens` the number of tokens. `level` is the
    gram's mean diagonal over those tokens that are not sinks: the unit of ridges, since a few huge
    tokens can make up most of the gram. With `bf16` (for activations that come in that precision)
    factors are rounded to bfloat16, several times faster where the hardware has it; sums remain
    float32.
    """

    def __init__(
        self, inputs: int, outputs: int = 0, device: torch.device | str = "cpu", bf16: bool = False
    ):
        self.bf16 = bf16
        self.gram = torch.zeros(inputs, inputs, device=device)
        self.cross = torch.zeros(inputs, outputs, device=device)
        self.sum_x = torch.zeros(inputs, device=device)
        self.sum_y = torch.zeros(outputs, device=device)
        self.level = self.weight = 0.0
        self.tokens = 0

    def add(
        self,
        x: Tensor,
        y: Tensor | None = None,
        w: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        """Take in `x (..., inputs)`, `y (..., outputs)`, weights `w (...)` and which tokens are
        sinks `(...)`.
        """
        x = x.reshape(-1, x.shape[-1]).float()
        w = torch.ones(len(x), device=x.device) if w is None else w.reshape(-1).float()
        root = w.sqrt()[:, None]
        xw = (
            (x * root).bfloat16().float() if self.bf16 else x * root
        )  # the same rounding in all sums: a centred gram stays positive
        with rounding(self.bf16):
            self.gram += xw.T @ xw
        self.sum_x += xw.T @ root[:, 0]
        if y is not None:
            yw = y.reshape(-1, y.shape[-1]).float() * root
            with rounding(self.bf16):
                self.cross += xw.T @ yw
            self.sum_y += yw.T @ root[:, 0]
        ordinary = xw if sinks is None else xw[~sinks.flatten()]
        self.level += float(ordinary.square().sum()) / x.shape[1]
        self.weight += float(w.double().sum())
        self.tokens += len(x)


def warn_of_little_text(tokens: Tensor, inputs: int) -> None:
    """Say so where `tokens (N, T)` are fewer than the inputs of the widest module: its gram matrix
    is singular but for the ridge.
    """
    if tokens.numel() < inputs:
        log.warning(
            "%d calibration tokens say little about modules of %d inputs: the weights that remain "
            "will fit noise; "
            "take more text, e.g. calib.samples=128 calib.length=512",
            tokens.numel(),
            inputs,
        )


@contextmanager
def rounding(bf16: bool) -> Iterator[None]:
    """float32 matrix products may round their factors (not the sums) to bfloat16 inside."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if bf16 else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass(frozen=True)
class Problem:
    """Least squares with the map `best (outputs, inputs)` as its solution: `min_A tr((A - best)
    gram (A - best)^T)`, in float64.

    `gram` is damped. With `affine`, maps have a bias that makes the mean output `mean_y`; sums are
    centred then.
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
        A = torch.cholesky_solve(self.gram[kept] @ self.best.T, factor(self.gram[kept][:, kept])).T
        return A, self.mean_y - A @ self.mean_x[kept] if self.affine else None

    def inverse(self) -> Tensor:
        """Inverse of the damped gram matrix."""
        return torch.cholesky_inverse(factor(self.gram))


def problem(
    stats: Normal, weight: Tensor, damp: float, affine: bool, repair: float = 32768
) -> Problem:
    """The regression around a module's weights `(outputs, inputs)`: what they put out, plus the `y`
    of the sums, if those were taken.

    Ridges are in units of the gram's mean diagonal over ordinary tokens. `damp` is that of the map
    as a whole. What is fitted to `y`, which says how far the output should move from where it is,
    has noise in it where the rest has none: its ridge weighs as much as `repair` tokens do, and so
    loses its hold as the text grows.
    """
    H, best = stats.gram.double(), weight.double()
    mean_x = stats.sum_x.double() / stats.weight
    mean_y = best @ mean_x
    if affine:
        H = H - stats.weight * torch.outer(mean_x, mean_x)
    unit = (
        H.diagonal()
        .mean()
        .clamp(
            min=torch.finfo(torch.float32).tiny,
            max=max(stats.level, torch.finfo(torch.float32).tiny),
        )
    )
    floor = (
        ROUNDING * stats.gram.double().diagonal().max()
    )  # of the sums as they were taken: centring cancels most of a large mean
    eye = torch.eye(len(H), dtype=H.dtype, device=H.device)
    if stats.cross.shape[1]:
        C, shift = stats.cross.double(), stats.sum_y.double() / stats.weight
        C = C - stats.weight * torch.outer(mean_x, shift) if affine else C
        best = (
            best
            + torch.cholesky_solve(C, factor(H + max(repair / stats.tokens * unit, floor) * eye)).T
        )
        mean_y = mean_y + shift
    return Problem(H + max(damp * unit, floor if damp else 0) * eye, best, mean_x, mean_y, affine)
