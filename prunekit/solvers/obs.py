"""Structured optimal brain surgeon: which input channels a linear map can spare, at what cost, if
the others make up for them.

For the quadratic error `tr((W - A) H (W - A)^T)` the channels S cost `tr(W_S (H^-1_SS)^-1 W_S^T)`;
then `W -= W_S (H^-1_SS)^-1 H^-1_S,:` and the inverse loses the same term (Hassibi & Stork 1993;
ZipLM, arXiv 2302.04089, and SlimGPT, arXiv 2412.18110, for structures).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from prunekit.errors import ConfigError

Removal = tuple[list[int], list[float]]
"""Units in the order in which they go, and what each one costs at its turn."""


@torch.no_grad()
def greedy_removal(weight: Tensor, inverse: Tensor, units: Tensor, count: int) -> Removal:
    """Greedy order: at every step the cheapest of the remaining units goes and the others make up
    for it.

    `weight` is `(outputs, inputs)`, scaled beforehand if errors of some outputs weigh more;
    `inverse` is `H^-1 (inputs, inputs)`; `units` is `(U, width)`, the inputs that each unit owns,
    which are all inputs in play; `count <= U` units go.
    """
    owned = units.flatten().to(inverse.device)
    V, M = weight[:, owned].float(), inverse[owned][:, owned].float()
    if units.shape[1] == 1:
        return _single(V, M, count)
    places = torch.arange(units.numel(), device=inverse.device).view(units.shape)
    return _wide(V, M, places, count)


def columns_left(units: Tensor, mask: Tensor, inputs: int) -> Tensor:
    """Indices of the inputs, of so many, that no unit owns which `mask (U,)` lets go."""
    stays = torch.ones(inputs, dtype=torch.bool)
    stays[units[~mask].flatten()] = False
    return stays.nonzero()[:, 0]


def _wide(V: Tensor, M: Tensor, units: Tensor, count: int) -> Removal:
    """Units of several inputs each, in float64: what is left of `M` after many removals is a small
    difference of large numbers.
    """
    V, M = V.double(), M.double()
    places = torch.arange(len(units), device=units.device)
    left, order, costs, failures = places, [], [], []
    for _ in range(count):
        own = units[left]  # (left, width)
        inner, failed = torch.linalg.cholesky_ex(M[own[:, :, None], own[:, None, :]])
        outer = V[:, own].permute(1, 2, 0)  # (left, width, outputs)
        cost = torch.linalg.solve_triangular(inner, outer, upper=False).square().sum((1, 2))
        best = cost.argmin()[None]
        S = own.index_select(0, best)[0]
        share = torch.cholesky_solve(M[S], inner.index_select(0, best)[0])
        V = V - V[:, S] @ share
        M = M - M[:, S] @ share
        # The rows and columns of S are zero now but for rounding, and are not looked at again.
        order.append(left.index_select(0, best))
        costs.append(cost.index_select(0, best))
        failures.append(failed.any())
        others = places[: len(left) - 1]
        left = left.index_select(0, others + (others >= best))
    return _removal(order, costs, failures)


def _removal(order: list[Tensor], costs: list[Tensor], failures: Sequence[Tensor] = ()) -> Removal:
    """The steps in Python's numbers: the one place where the host waits for the device. Raises
    ConfigError where a step had no Cholesky factor.
    """
    if failures and bool(torch.stack(list(failures)).any()):
        raise ConfigError(
            "an inverse gram matrix is not positive definite: raise the ridge or calibrate on more "
            "text"
        )
    if not order:
        return [], []
    return torch.cat(order).tolist(), torch.cat(costs).clamp(min=0).tolist()


def _single(V: Tensor, M: Tensor, count: int, panel: int = 32) -> Removal:
    """Units of one input each, exactly one at a time; the rank-one updates of V and M are put off
    and done `panel` at a time.

    Inside a panel the true matrices are `V - A B^T` and `M - B B^T`. After it the removed inputs
    are dropped, so that the work shrinks.
    """
    left = torch.arange(M.shape[0], device=M.device)
    order: list[Tensor] = []
    costs: list[Tensor] = []
    while len(order) < count:
        steps = min(panel, count - len(order))
        diagonal, norms = M.diagonal().clone(), V.square().sum(0)
        A, B = V.new_zeros(len(V), steps), M.new_zeros(len(M), steps)
        gone = torch.zeros(len(M), dtype=torch.bool, device=M.device)
        for k in range(steps):
            cost = torch.where(gone, math.inf, norms / diagonal)
            p = cost.argmin()[None]  # stays where it is: an int would make the host wait
            row = B.index_select(0, p)[0, :k]
            h = M.index_select(1, p)[:, 0] - B[:, :k] @ row
            v = V.index_select(1, p)[:, 0] - A[:, :k] @ row
            pivot = h.index_select(0, p).clamp(min=torch.finfo(h.dtype).tiny)
            overlap = v @ V - B[:, :k] @ (A[:, :k].T @ v)
            norms = (norms - 2 * overlap * h / pivot + v.dot(v) * (h / pivot).square()).clamp(min=0)
            diagonal = diagonal - h.square() / pivot
            diagonal.index_fill_(0, p, 1.0)
            gone.index_fill_(0, p, True)
            A[:, k], B[:, k] = v / pivot.sqrt(), h / pivot.sqrt()
            order.append(left.index_select(0, p))
            costs.append(cost.index_select(0, p))
        # As many stay as are not gone: sorting, unlike nonzero, needs no word from the device.
        stay = gone.to(torch.uint8).argsort(stable=True)[: len(left) - steps]
        B = B[stay]
        V, M, left = V[:, stay] - A @ B.T, M[stay][:, stay] - B @ B.T, left[stay]
    return _removal(order, costs)
