"""BESA's learned shares (Xu et al., ICLR 2024, arXiv 2402.16880): how much each matrix of a block,
or each of its rows, loses is learned by gradient on what the block puts out. Tensors in, tensors
out.

The order in which the weights of a row go is given (Wanda's). A share is the mean of candidate
shares d / D, d = 0..D, under learned weights beta = softmax(theta), theta `(1, D + 1)` for a matrix
or `(rows, D + 1)` for its rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from prunekit.selection.elements import running_sums

SCALE = 2.0**16
"""By what the loss of float16 weights is multiplied: its gradients, of a mean over channels of what
each token adds to an error, lie below what float16 tells from zero.
"""
EPSILON = 1e-4
"""Of a weight: a share times the inputs may be this much short of a whole number for rounding."""


class Matrix(NamedTuple):
    """A matrix and the order in which the weights of each of its rows go, both `(rows, inputs)`:
    rank 0 goes first.
    """

    weight: Tensor
    rank: Tensor


def ranked(weight: Tensor, scores: Tensor) -> Matrix:
    """The matrix with its weights in the order of their scores, the lowest first; ties by index."""
    order = scores.argsort(dim=1, stable=True)
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    return Matrix(weight, torch.empty_like(order).scatter_(1, order, places))


def start(share: float, rows: int, candidates: int, device: torch.device | str = "cpu") -> Tensor:
    """(rows, candidates + 1) theta of the flattest beta whose mean is `share`: 0 for a half, the
    paper's start.
    """
    places = torch.linspace(0, 1, candidates + 1, dtype=torch.float64)
    low, high = -1e4, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        mean = float((torch.softmax(middle * places, 0) * places).sum())
        low, high = (middle, high) if mean < share else (low, middle)
    return ((low + high) / 2 * places).float().repeat(rows, 1).to(device)


def share_of(theta: Tensor) -> Tensor:
    """(rows) learned shares."""
    places = torch.linspace(0, 1, theta.shape[1], device=theta.device)
    return torch.softmax(theta, 1) @ places


def staying(theta: Tensor, inputs: int) -> Tensor:
    """(rows, inputs) probability that the weight of each rank stays, not falling: the weight of the
    candidates that remove no more than `rank` of the inputs.
    """
    sums = running_sums(torch.softmax(theta, 1))
    return sums[:, _bin(theta.shape[1] - 1, inputs, theta.device)]


def _bin(candidates: int, inputs: int, device: torch.device) -> Tensor:
    """(inputs) the last candidate that leaves the weight of each rank alone."""
    removed = torch.arange(candidates + 1, device=device) * inputs // candidates
    return torch.searchsorted(removed, torch.arange(inputs, device=device), right=True) - 1


def mask(theta: Tensor, rank: Tensor) -> Tensor:
    """(rows, inputs) one where a weight stays, zero for the `floor(share * inputs)` first of a row;
    its gradient is that of `staying`.
    """
    inputs = rank.shape[1]
    removed = (share_of(theta).detach() * inputs + EPSILON).floor()
    hard = (rank >= removed[:, None]).float()
    soft = staying(theta, inputs).expand(len(rank), -1).gather(1, rank)
    return hard + (soft - soft.detach())  # exactly hard


def channel_error(out: Tensor, dense: Tensor) -> Tensor:
    """Mean over channels of `||out_j - dense_j||^2 / ||dense_j||^2`, for outputs `(..., C)`."""
    out, dense = (x.reshape(-1, x.shape[-1]).float() for x in (out, dense))
    size = dense.square().sum(0).clamp(min=torch.finfo(torch.float32).tiny)
    return ((out - dense).square().sum(0) / size).mean()


def learn(
    matrices: dict[str, Matrix],
    error: Callable[[dict[str, Tensor], int], Tensor],
    target: float,
    steps: int,
    *,
    per_row: bool = False,
    candidates: int = 100,
    rate: float = 0.05,
    pull: float = 5.0,
) -> dict[str, Tensor]:
    """Name -> learned shares `(1)` of a matrix, or `(rows)`; not yet met exactly (`project`).

    Args:
        error: of a batch's outputs, for masked weights by name and the number of the step.
        target: share of all weights that shall go.
        per_row: a share for each row instead of one for each matrix.
        candidates: D.
        rate: step size of Adam on theta.
        pull: weight of `((share - target) / target)^2` beside the error, the paper's 5.
    """
    total = sum(m.weight.numel() for m in matrices.values())
    thetas = {
        name: start(target, len(m.weight) if per_row else 1, candidates, m.weight.device)
        for name, m in matrices.items()
    }
    half = any(m.weight.dtype is torch.float16 for m in matrices.values())
    scale = SCALE if half else 1.0
    optimizer = torch.optim.Adam([t.requires_grad_() for t in thetas.values()], lr=rate)
    for step in range(steps):
        with torch.enable_grad():
            masked = {
                name: m.weight * mask(thetas[name], m.rank).to(m.weight.dtype)
                for name, m in matrices.items()
            }
            reached = sum(
                share_of(thetas[name]).mean() * (m.weight.numel() / total)
                for name, m in matrices.items()
            )
            loss = error(masked, step) + pull * ((reached - target) / target) ** 2
            loss = loss * scale
        optimizer.zero_grad()
        loss.backward()
        for theta in thetas.values() if half else ():
            theta.grad = None if theta.grad is None else theta.grad / scale
        optimizer.step()
    return {name: share_of(theta.detach()) for name, theta in thetas.items()}


def project(shares: list[Tensor], inputs: list[int], rows: list[int], count: int) -> list[Tensor]:
    """How many weights each row of each matrix loses, the shares moved alike until `count` weights
    go in all.

    `shares`, one tensor a matrix, are `(1)`, all its rows losing the same, or `(rows)`. What the
    rounding leaves goes to those nearest to one more. The result has the shares' shapes, on the
    CPU; the total falls short by less than the most rows that lose together. Each row keeps a
    weight.
    """
    sizes = [len(s) for s in shares]
    wanted = torch.cat([s.double() for s in shares]).cpu()  # the search asks for many totals
    wide = torch.repeat_interleave(torch.tensor(inputs), torch.tensor(sizes))
    together = [r // n for r, n in zip(rows, sizes, strict=True)]
    step = torch.repeat_interleave(torch.tensor(together), torch.tensor(sizes))

    def at(shift: float) -> Tensor:
        return ((wanted + shift).clamp(0, 1) * wide + EPSILON).minimum(wide - 1.0)

    low, high = -1.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        removed = int((at(middle).floor() * step).sum())
        low, high = (middle, high) if removed <= count else (low, middle)
    real = at(low)
    counts = real.floor().long()
    order = (counts - real).masked_fill(counts >= wide - 1, 1).argsort(stable=True)
    order = order[counts[order] < wide[order] - 1]
    fits = (step[order].cumsum(0) + (counts * step).sum()) <= count
    counts[order[fits]] += 1
    return list(counts.split(sizes))
