"""OWL (Yin et al., ICML 2024, arXiv 2310.05175): a block with more outliers among its Wanda scores
loses less.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from prunekit.architecture.matrices import matrices, matrix
from prunekit.errors import ConfigError
from prunekit.problem import Problem
from prunekit.registry import Above, Share, ratios
from prunekit.scoring.wanda import input_norms, wanda_score
from prunekit.selection.elements import floor_share
from prunekit.types import Allocation, Counts, Group


@ratios.register(paper="arXiv 2310.05175", year=2023, needs="data")
def owl(
    problem: Problem,
    groups: list[Group],
    *,
    target: Share = 0.5,
    lamda: Annotated[float, Field(ge=0, le=0.5)] = 0.08,
    M: Above = 5,
) -> Allocation:
    """Shares by block, `target` of the units on average: the more outliers among a block's Wanda
    scores, the smaller its share.

    Args:
        lamda: shares of all blocks lie within `2 * lamda` of each other; 0 gives all the same.
        M: a score above M times the block's mean is an outlier.

    Outliers are those of the dense model's linear matrices, `|w_ij| * ||x_j||`, whatever chooses
    the units later. Blocks count by their units, which keeps the total exact; no block loses less
    than nothing. The paper's mixed N:8 is `pruner.pattern=N:8` with lamda 0.125 (its 2, of 8 inputs
    and without the factor of two) and M 6. Raises ConfigError for units that stand outside of the
    blocks.
    """
    outside = [g.name for g in groups if g.layer is None]
    if outside:
        raise ConfigError(
            f"ratio=owl gives each block a share of its own, and {outside[0]} is not inside a "
            "block: take ratio=uniform"
        )
    if target == 0:
        return Allocation({g.name: 0 for g in groups})
    layers = sorted({g.layer for g in groups if g.layer is not None})
    units = [sum(g.units for g in groups if g.layer == i) for i in layers]
    found = outliers(problem, layers, M) if lamda else [0.0] * len(layers)
    by_layer = dict(zip(layers, shares(found, units, target, lamda), strict=True))
    return Allocation(rounded(groups, by_layer, target))


def rounded(groups: list[Group], by_layer: dict[int, float], target: float) -> Counts:
    """Whole units of each group by its block's share, one of each staying; those that rounding down
    leaves to the total of `target` go where most of a unit was cut off.
    """
    share = {g.name: by_layer[g.layer] for g in groups if g.layer is not None}
    wanted = {g.name: g.units * share[g.name] for g in groups}
    most = {g.name: g.units - 1 for g in groups}
    counts = {g.name: min(floor_share(g.units, share[g.name]), most[g.name]) for g in groups}
    rest = floor_share(sum(g.units for g in groups), target) - sum(counts.values())
    for name in sorted(counts, key=lambda n: counts[n] - wanted[n]):
        if rest > 0 and wanted[name] > counts[name] < most[name]:
            counts[name] += 1
            rest -= 1
    return counts


@torch.no_grad()
def outliers(problem: Problem, layers: list[int], factor: float) -> list[float]:
    """Percentage of a block's Wanda scores above `factor` times their mean, on the dense model."""
    model = problem.model
    inside = [g for g in matrices(model) if g.layer in layers]
    norms = input_norms(model, inside, problem.run())
    out = []
    for layer in layers:
        scores = [wanda_score(matrix(model, g), norms[g.name]) for g in inside if g.layer == layer]
        count = sum(s.numel() for s in scores)
        if not count:
            raise ConfigError(
                f"ratio=owl counts outliers of linear matrices, and block {layer} has none"
            )
        mean = sum(float(s.double().sum()) for s in scores) / count
        out.append(100 * sum(int((s > factor * mean).sum()) for s in scores) / count)
    return out


def shares(found: list[float], units: list[int], target: float, lamda: float) -> list[float]:
    """`target - (d - mean d)`, where d is the outlier percentage stretched to [0, 2 * lamda];
    means are weighted by units.

    Where that leaves [0, 1), the shares are cut off there and all moved alike until the mean is
    `target` again.
    """
    low, high = min(found), max(found)
    d = [2 * lamda * (x - low) / (high - low) if high > low else 0.0 for x in found]
    total = sum(units)

    def at(shift: float) -> list[float]:
        return [min(max(shift - x, 0.0), 1.0) for x in d]

    first = target + sum(x * u for x, u in zip(d, units)) / total
    if first - max(d) >= 0 and first - min(d) < 1:
        return at(first)
    below, above = 0.0, 1 + 2 * lamda
    for _ in range(100):
        middle = (below + above) / 2
        reached = sum(s * u for s, u in zip(at(middle), units)) / total
        below, above = (middle, above) if reached <= target else (below, middle)
    return at(below)
