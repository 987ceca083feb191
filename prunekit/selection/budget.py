"""Sharing a budget of parameters among groups whose units have known costs: always take what costs
least per parameter.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

from torch import Tensor

from prunekit.types import Counts


class Step(NamedTuple):
    """`units` units of a group go together, at `price` per parameter each."""

    price: float
    group: str
    units: int


def hull(costs: list[float]) -> list[int]:
    """Corners of the lower convex hull of the points `(k, costs[k])`: the counts
    worth stopping at.
    """
    corners: list[int] = []
    for k, y in enumerate(costs):
        while len(corners) > 1:
            a, b = corners[-2:]
            if (costs[b] - costs[a]) * (k - b) < (y - costs[b]) * (b - a):
                break
            corners.pop()
        corners.append(k)
    return corners


def cheapest(curves: dict[str, Tensor], sizes: dict[str, int], budget: float) -> Counts:
    """How many units of each group go, for at most `budget` parameters.

    `curves[name][k]` is what removing k + 1 units costs in all, `sizes[name]` the parameters of one
    unit. Every curve is replaced by its lower convex hull, whose pieces are bought in order of
    price; a piece that does not fit is bought in part, whole units at a time. One unit of every
    group stays.
    """
    steps = []
    for name, curve in curves.items():
        costs = [0.0, *curve[:-1].tolist()]
        corners = hull(costs)
        steps += [
            Step((costs[b] - costs[a]) / ((b - a) * sizes[name]), name, b - a)
            for a, b in itertools.pairwise(corners)
        ]
    counts = dict.fromkeys(curves, 0)
    left, closed = budget, set()
    for step in sorted(steps, key=lambda s: s.price):
        if step.group in closed:
            continue
        units = min(step.units, int(left // sizes[step.group]))
        counts[step.group] += units
        left -= units * sizes[step.group]
        if units < step.units:
            closed.add(step.group)
    return counts
