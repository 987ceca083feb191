"""Hard-concrete gates (Louizos et al., arXiv 1712.01312) over the units of groups, as CoFi, Sheared
LLaMA (arXiv 2310.06694), NutePrune (arXiv 2402.09773) and Compresso (arXiv 2310.05015) learn them.

A unit's gate z lies in [0, 1] and is 0 and 1 with positive probability; its parameter is log alpha.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from prunekit.types import Group

BETA = 2 / 3
LOW, HIGH = -0.1, 1.1
"""The interval to which the concrete distribution is stretched before it is clipped to [0, 1]."""
LIMITS = (math.log(1e-2), math.log(1e2))
"""Between which log alpha is kept."""
START = math.log(0.99 / 0.01)
"""log alpha of units that are dropped with a probability of about 1 %."""
SHARPNESS = 0.8
"""Of the gate without noise."""
SPREAD = 2 * LIMITS[1]
"""Log alpha of the highest ranks, where masks begin in an order: twice the limit, so that few units
are undecided at a time.
"""
BISECTIONS = 24
"""Which leave 1e-7 of the interval in which the shift of log alpha lies."""


def by_rank(scores: Tensor) -> Tensor:
    """(U,) log alpha of one group in the order of its scores, evenly from -SPREAD to SPREAD."""
    ranks = scores.argsort(stable=True).argsort()
    return SPREAD * ((2 * ranks + 1) / len(scores) - 1)


def sample(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """z, of `uniform` noise in (0, 1) of the same shape."""
    noise = uniform.log() - (1 - uniform).log()
    stretched = torch.sigmoid((noise + log_alpha) / BETA) * (HIGH - LOW) + LOW
    return stretched.clamp(0, 1)


def slope(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """dz / d(log alpha) of `sample` with the same noise."""
    noise = uniform.log() - (1 - uniform).log()
    s = torch.sigmoid((noise + log_alpha) / BETA)
    stretched = s * (HIGH - LOW) + LOW
    inside = (stretched > 0) & (stretched < 1)
    return torch.where(inside, (HIGH - LOW) / BETA * s * (1 - s), 0)


def open_probability(log_alpha: Tensor) -> Tensor:
    """P(z > 0): the expected L0 norm, unit by unit."""
    return torch.sigmoid(log_alpha - BETA * math.log(-LOW / HIGH))


def soft(log_alpha: Tensor) -> Tensor:
    """The gate of a unit that stays, without noise."""
    return torch.sigmoid(SHARPNESS * log_alpha / BETA)


def deterministic(log_alpha: Tensor, closed: int | None = None) -> Tensor:
    """z of one group without noise: `closed` units, by default as many as are expected to be, those
    of the lowest log alpha (the first of equals), are 0, the others are `soft`.
    """
    if closed is None:
        closed = round(float((1 - open_probability(log_alpha)).sum()))
    z = soft(log_alpha)
    return z.index_fill(0, log_alpha.argsort(stable=True)[:closed], 0)


def lagrangian(multipliers: Tensor, gaps: Sequence[Tensor]) -> Tensor:
    """Sum over the constraints of `l1 mean(gap) + l2 mean(gap^2)`.

    multipliers: (K, 2), which ascend. gaps: how far each constraint is from its target; one gap, or
        one for every group that the constraint holds for.
    """
    terms = [
        row[0] * gap.mean() + row[1] * gap.square().mean()
        for row, gap in zip(multipliers, gaps, strict=True)
    ]
    return torch.stack(terms).sum()


def ramp(step: int, warmup: int) -> float:
    """Share of the target that holds at a step: from 0 up to 1 in `warmup` steps, then 1."""
    return min(1.0, step / warmup) if warmup else 1.0


@torch.no_grad()
def shift(log_alpha: Tensor, closed: Callable[[Tensor], Tensor], target: float) -> float:
    """The number by which log alpha has to grow for `closed` of it to be the target.

    closed: of log alpha between its limits a scalar that falls as log alpha grows, e.g. the
        expected sparsity.
    """
    up = float(log_alpha.abs().max()) + LIMITS[1]  # all are at a limit then
    down = -up
    for _ in range(BISECTIONS):
        middle = (down + up) / 2
        if float(closed((log_alpha + middle).clamp(*LIMITS))) > target:
            down = middle
        else:
            up = middle
    return up


class ExpectedSize:
    """How many parameters are expected to stay, exactly: gates are independent, so that a tensor is
    expected to keep the product over its axes of the lengths that it is expected to keep.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group], device: torch.device):
        """groups: whose probabilities will come, in this order. Blocks, and experts in a list,
        count with all that they hold.
        """
        named = dict(model.named_parameters())  # tied ones once
        axes = max(p.dim() for p in named.values())
        self.total = sum(p.numel() for p in named.values())
        self._members = [bool(g.members) for g in groups]
        self._modules = [bool(g.modules) for g in groups]
        # A row for each parameter, whose product is its size: the lengths of its axes, then whether
        # its expert and its block are there. Of what groups may remove, base has what stays anyway.
        base = torch.ones(len(named), axes + 2, dtype=torch.float64)
        row = {name: i for i, name in enumerate(named)}
        for name, p in named.items():
            base[row[name], : p.dim()] = torch.tensor(p.shape, dtype=torch.float64)
        entries: list[tuple[int, int, float]] = []  # place in base, column, channels of a unit
        column = 0
        for g in groups:
            for m in g.members:
                if m.param in row:  # buffers are no parameters
                    base[row[m.param], m.axis] -= g.units * m.width
                    entries.append((row[m.param] * (axes + 2) + m.axis, column, m.width))
            column += bool(g.members)
            last = axes + (g.kind == "blocks")
            for u, path in enumerate(g.modules):
                for name in row:
                    if name.startswith(path + "."):
                        base[row[name], last] = 0
                        entries.append((row[name] * (axes + 2) + last, column + u, 1.0))
            column += len(g.modules)
        self._base = base.to(device)
        places, columns, widths = zip(*entries, strict=True)
        self._places = torch.tensor(places, device=device)
        self._columns = torch.tensor(columns, device=device)
        self._widths = torch.tensor(widths, dtype=torch.float64, device=device)

    def __call__(self, opened: Sequence[Tensor]) -> Tensor:
        """Scalar float64; `opened`: (U,) probabilities, group by group."""
        sums = []
        for p, members, modules in zip(opened, self._members, self._modules, strict=True):
            sums += [p.double().sum()[None]] * members + [p.double()] * modules
        kept = self._widths * torch.cat(sums)[self._columns]
        lengths = self._base.flatten().index_add(0, self._places, kept).view_as(self._base)
        return lengths.prod(1).sum()
