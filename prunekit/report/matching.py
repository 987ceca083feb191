"""What a curve of quality by sparsity says: how much may go before quality falls off (Essential
Sparsity, arXiv 2306.03805), and whether a pruned model matches (LLM-KICK, arXiv 2310.01382).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

Curve = Mapping[float, float]
"""sparsity -> quality; 0 is the dense model's."""


def drop(dense: float, value: float, better: int) -> float:
    """Share of the dense quality that is lost, below 0 where there is more. `better` is 1 where
    more is better, -1 where less is (perplexity: 0.05 is 5 % above the dense one). A quality of 0
    can lose nothing, or all: infinity.
    """
    lost = better * (dense - value)
    if dense == 0:
        return math.copysign(math.inf, lost) if lost else 0.0
    return lost / abs(dense)


def matches(dense: float, value: float, better: int, tolerance: float = 0.05) -> bool:
    """Whether no more than `tolerance` of the dense quality is lost."""
    return drop(dense, value, better) <= tolerance * (1 + 1e-9)


def drop_point(curve: Curve, better: int, tolerance: float = 0.05) -> float:
    """The largest sparsity on the curve that matches, as do all smaller ones: the essential
    sparsity, the largest matching one. Raises ValueError for a curve without 0.
    """
    found = 0.0
    for sparsity in sorted(_with_dense(curve)):
        if not matches(curve[0.0], curve[sparsity], better, tolerance):
            break
        found = sparsity
    return found


def next_sparsity(
    curve: Curve, better: int, tolerance: float = 0.05, width: float = 0.01
) -> float | None:
    """The sparsity in the middle between the drop point and the next one on the curve; None where
    they are not further apart than `width`, or the curve has not dropped. Raises ValueError.
    """
    low = drop_point(curve, better, tolerance)
    above = [s for s in curve if s > low]
    if not above or min(above) - low <= width * (1 + 1e-9):
        return None
    return (low + min(above)) / 2


def bisect(
    quality: Callable[[float], float],
    curve: Curve,
    better: int,
    tolerance: float = 0.05,
    width: float = 0.01,
) -> dict[float, float]:
    """The curve with points of `quality` added until the drop point is known to `width`. Raises
    ValueError for a curve without 0.
    """
    found = dict(curve)
    while (sparsity := next_sparsity(found, better, tolerance, width)) is not None:
        found[sparsity] = quality(sparsity)
    return found


def knee(curve: Curve) -> float:
    """The sparsity at which the curve is furthest from the line between its ends, both axes scaled
    to 1 (Satopaa et al. 2011); 0 for a line. Raises ValueError for fewer than two points.
    """
    points = sorted(curve.items())
    if len(points) < 2:
        raise ValueError("a knee needs two points at least")
    (first, start), (last, end) = points[0], points[-1]
    height = max(curve.values()) - min(curve.values())
    best, found = 1e-9, 0.0
    for sparsity, value in points:
        along = (sparsity - first) / (last - first)
        away = abs(value - start - along * (end - start)) / height if height else 0.0
        if away > best:
            best, found = away, sparsity
    return found


def spearman(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Rank correlation, ties at their mean rank, and its two-sided p; (nan, nan) where a side is
    constant or there are fewer than three pairs.
    """
    if len(x) < 3 or len(set(x)) < 2 or len(set(y)) < 2:
        return math.nan, math.nan
    from scipy.stats import spearmanr

    found = spearmanr(x, y)
    return float(found.statistic), float(found.pvalue)


def _with_dense(curve: Curve) -> Curve:
    if 0.0 not in curve:
        raise ValueError("the curve has no dense point: sparsity 0 is missing")
    return curve
