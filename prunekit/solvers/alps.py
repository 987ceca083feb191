"""ALPS (Meng et al., NeurIPS 2024, arXiv 2406.07831): the mask by ADMM with a penalty that grows
until the mask rests, then the weights that stay by conjugate gradients. Tensors in, tensors out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit.solvers.admm import Select
from prunekit.solvers.preconditioning import inverse, unit_diagonal

GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""Factor of the penalty where more than this share of the support has changed."""


@torch.no_grad()
def alps(
    weight: Tensor,
    gram: Tensor,
    select: Select,
    count: int,
    *,
    iterations: int = 300,
    every: int = 3,
    ridge: float = 0.01,
    penalty: float = 0.1,
    cg_steps: int = 10,
    name: str = "weight",
) -> tuple[Tensor, Tensor]:
    """New weights and the mask of what stays, both `(outputs, inputs)`, float32.

    With `A` the gram matrix plus a ridge, inputs scaled so that its diagonal is one: `B = (A B0 -
    V + rho D) (A + rho I)^-1`, `D` the `B + V / rho` that stay, `V += rho (B - D)`. `rho` starts at
    `penalty` and grows `every` so many iterations by how much of the support changed since; no
    change ends it. The mask is then that of `B`, and `cg_steps` conjugate gradient steps go from
    there towards the least squares solution.

    `gram (inputs, inputs)`: the sum or mean of `x x^T`; `ridge` in units of its mean diagonal.
    `count` elements go. Raises ConfigError, with `name`, where there is no inverse.
    """
    H = gram.double().clone()
    H.diagonal().add_(ridge * H.diagonal().mean())
    exact, norms = unit_diagonal(H)
    A, scale = exact.float(), norms.float()
    dense = weight.float() * scale
    fit = dense @ A
    V = torch.zeros_like(dense)
    mask = select(dense.abs(), count)
    B, D, before, rho = dense, dense * mask, mask, penalty
    step = _step(exact, rho, name)
    for t in range(1, iterations + 1):
        B = (fit - V + rho * D) @ step
        raw = B + V / rho
        mask = select(raw.abs(), count)
        D = raw * mask
        V += rho * (B - D)
        if t % every == 0:
            changed = float((mask ^ before).sum() / mask.sum().clamp(min=1))
            grow = next((factor for least, factor in GROWTH if changed > least), None)
            if grow is None:
                break
            rho, before = rho * grow, mask
            step = _step(exact, rho, name)
    mask = select(B.abs(), count)
    return conjugate_gradient(A, fit, B * mask, mask, cg_steps) / scale, mask


def _step(A: Tensor, rho: float, name: str) -> Tensor:
    shifted = A.clone()
    shifted.diagonal().add_(rho)
    return inverse(shifted, name).float()


def conjugate_gradient(A: Tensor, fit: Tensor, start: Tensor, mask: Tensor, steps: int) -> Tensor:
    """`steps` conjugate gradient steps for each row of `X A = fit` over the elements of the mask.

    `A (inputs, inputs)` is symmetric positive; the others `(outputs, inputs)`. A row that is solved
    stays where it is.
    """
    tiny = torch.finfo(start.dtype).tiny
    X = start
    R = (fit - X @ A) * mask
    P, square = R, R.square().sum(1, keepdim=True)
    for _ in range(steps):
        Q = (P @ A) * mask
        length = square / (P * Q).sum(1, keepdim=True).clamp(min=tiny)
        X = X + length * P
        R = R - length * Q
        again = R.square().sum(1, keepdim=True)
        P = R + again / square.clamp(min=tiny) * P
        square = again
    return X
