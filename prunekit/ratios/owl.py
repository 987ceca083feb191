"""OWL (Yin et al., ICML 2024, arXiv 2310.05175): a block with more outliers among its Wanda scores
loses less.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from prunekit.architecture.matrices import input_norms, matrices, matrix, wanda_score
from prunekit.errors import ConfigError
from prunekit.registry import Share, ratios
from prunekit.selection.elements import share
from prunekit.types import Counts, Group, Run


@ratios.register(paper="arXiv 2310.05175", year=2023, needs="data")
def owl(
    model: nn.Module,
    groups: list[Group],
    run: Run,
    *,
    target: Share = 0.5,
    spread: Annotated[float, Field(ge=0, le=0.5)] = 0.08,
    outlier: Annotated[float, Field(gt=0)] = 5,
) -> Counts:
    """Shares by block, `target` of the units on average: the more scores above `outlier` times the
    block's mean, the smaller.

    The shares of all blocks lie within `2 * spread` of each other (the paper's lambda; 0 is
    ratio=uniform of=units). Outliers are those of the dense model's linear matrices, `|w_ij| *
    ||x_j||`, whatever chooses the units later. Blocks count by their units, which keeps the total
    exact; no block loses less than nothing. Raises ConfigError for units that stand outside of the
    blocks.
    """
    outside = [g.name for g in groups if g.layer is None]
    if outside:
        raise ConfigError(
            f"ratio=owl gives each block a share of its own, and {outside[0]} is not inside a "
            "block: take ratio=uniform"
        )
    if target == 0:
        return {g.name: 0 for g in groups}
    layers = sorted({g.layer for g in groups if g.layer is not None})
    units = [sum(g.units for g in groups if g.layer == i) for i in layers]
    found = outliers(model, layers, outlier, run) if spread else [0.0] * len(layers)
    by_layer = dict(zip(layers, shares(found, units, target, spread), strict=True))
    return {g.name: min(share(g.units, by_layer[g.layer or 0]), g.units - 1) for g in groups}


@torch.no_grad()
def outliers(model: nn.Module, layers: list[int], factor: float, run: Run) -> list[float]:
    """Percentage of a block's Wanda scores above `factor` times their mean, on the dense model."""
    inside = [g for g in matrices(model) if g.layer in layers]
    norms = input_norms(model, inside, run)
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


def shares(found: list[float], units: list[int], target: float, spread: float) -> list[float]:
    """`target - (d - mean d)`, where d is the outlier percentage stretched to [0, 2 * spread];
    means are weighted by units.

    Where that leaves [0, 1), the shares are cut off there and all moved alike until the mean is
    `target` again.
    """
    low, high = min(found), max(found)
    d = [2 * spread * (x - low) / (high - low) if high > low else 0.0 for x in found]
    total = sum(units)

    def at(shift: float) -> list[float]:
        return [min(max(shift - x, 0.0), 1.0) for x in d]

    first = target + sum(x * u for x, u in zip(d, units)) / total
    if first - max(d) >= 0 and first - min(d) < 1:
        return at(first)
    below, above = 0.0, 1 + 2 * spread
    for _ in range(100):
        middle = (below + above) / 2
        reached = sum(s * u for s, u in zip(at(middle), units)) / total
        below, above = (middle, above) if reached <= target else (below, middle)
    return at(below)
