"""Normal equations of a linear module, streamed: `H = sum_t w_t x_t x_t^T` and `C = sum_t w_t x_t y_t^T`, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prunekit.registry import ConfigError


class Normal:
    """Sums over tokens of a module's inputs `x (inputs)` and of the outputs `y (outputs)` it should give, float32 on the inputs' device.

    Tokens may have weights. `square` is the (weighted) sum of |y|^2, `weight` that of the weights, `tokens` their number.
    """

    def __init__(self, inputs: int, outputs: int = 0, device: torch.device | str = "cpu"):
        self.gram = torch.zeros(inputs, inputs, device=device)
        self.cross = torch.zeros(inputs, outputs, device=device)
        self.sum_x = torch.zeros(inputs, device=device)
        self.sum_y = torch.zeros(outputs, device=device)
        self.square = self.weight = 0.0
        self.tokens = 0

    def add(self, x: Tensor, y: Tensor | None = None, w: Tensor | None = None) -> None:
        """Take in `x (..., inputs)`, `y (..., outputs)` and weights `w (...)`."""
        x = x.reshape(-1, x.shape[-1]).float()
        w = torch.ones(len(x), device=x.device) if w is None else w.reshape(-1).float()
        root = w.sqrt()[:, None]
        xw = x * root
        self.gram.addmm_(xw.T, xw)
        self.sum_x += x.T @ w
        if y is not None:
            yw = y.reshape(-1, y.shape[-1]).float() * root
            self.cross.addmm_(xw.T, yw)
            self.sum_y += yw.T @ root[:, 0]
            self.square += float(yw.double().square().sum())
        self.weight += float(w.double().sum())
        self.tokens += len(x)


@dataclass(frozen=True)
class Problem:
    """The ridge regression `min_A sum_t w_t |y_t - A x_t - b|^2 + damp |A - anchor|^2`, in float64; see `problem`."""

    gram: Tensor
    cross: Tensor
    mean_x: Tensor
    mean_y: Tensor
    affine: bool

    def solve(self, kept: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Weights `(outputs, kept inputs)` and bias of the best map from the inputs `kept` (indices; default all) alone."""
        H, C = (self.gram, self.cross) if kept is None else (self.gram[kept][:, kept], self.cross[kept])
        A = torch.cholesky_solve(C, factor(H)).T
        mean_x = self.mean_x if kept is None else self.mean_x[kept]
        return A, self.mean_y - A @ mean_x if self.affine else None

    def inverse(self) -> Tensor:
        """Inverse of the damped gram matrix."""
        return torch.cholesky_inverse(factor(self.gram))


def factor(H: Tensor) -> Tensor:
    """Lower Cholesky factor. Raises ConfigError where rounding left the matrix without one."""
    L, failed = torch.linalg.cholesky_ex(H)
    if int(failed):
        raise ConfigError(f"a gram matrix of {len(H)} inputs is not positive definite: raise pruner.damp or calibrate on more text")
    return L


def problem(stats: Normal, anchor: Tensor, damp: float, affine: bool, follow: bool = True) -> Problem:
    """The regression whose ridge pulls towards the weights `anchor (outputs, inputs)`; `damp` is in units of the gram's mean diagonal.

    `affine` also fits a bias, which amounts to centring both sides. `follow=False` puts `anchor`'s own outputs in place of the targets.
    """
    H, anchor = stats.gram.double(), anchor.double()
    mean_x = stats.sum_x.double() / stats.weight
    C, mean_y = (stats.cross.double(), stats.sum_y.double() / stats.weight) if follow else (H @ anchor.T, anchor @ mean_x)
    if affine:
        C = C - stats.weight * torch.outer(mean_x, mean_y)
        H = H - stats.weight * torch.outer(mean_x, mean_x)
    ridge = damp * H.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    H = H + ridge * torch.eye(len(H), dtype=H.dtype, device=H.device)
    return Problem(H, C + ridge * anchor.T, mean_x, mean_y, affine)
