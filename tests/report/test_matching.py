"""Drop points, knees and rank correlations of curves that were drawn to have them."""

from __future__ import annotations

import math

import pytest

from prunekit.report.matching import (
    bisect,
    drop,
    drop_point,
    knee,
    matches,
    next_sparsity,
    spearman,
)

GRID = [i / 10 for i in range(10)]


def broken(at: float, better: int):
    """Flat up to `at`, a tenth a tenth worse behind it."""
    return lambda s: 10 - better * 10 * max(0.0, s - at)


@pytest.mark.parametrize("better", [1, -1])
def test_the_finder_returns_the_grid_point_of_a_known_break(better):
    for at in GRID[:-1]:
        curve = {s: broken(at, better)(s) for s in GRID}
        assert drop_point(curve, better) == at
        assert curve[0.0] == 10


def test_a_point_that_matches_behind_one_that_does_not_counts_for_nothing():
    assert drop_point({0.0: 1.0, 0.1: 0.5, 0.2: 1.0}, 1) == 0
    assert drop_point({0.0: 1.0, 0.1: 0.95, 0.2: 0.94}, 1) == 0.1  # the bound itself matches


def test_bisection_closes_in_on_the_break():
    asked = []

    def quality(s: float) -> float:
        asked.append(s)
        return broken(0.33, 1)(s)

    curve = {s: broken(0.33, 1)(s) for s in GRID}
    found = bisect(quality, curve, 1, width=0.01)
    assert asked[0] == pytest.approx(0.35)
    assert len(asked) == 4
    assert 0 <= 0.33 + 0.05 - drop_point(found, 1) <= 0.011
    assert bisect(quality, found, 1, width=0.01) == found
    assert next_sparsity({0.0: 1.0, 0.5: 1.0}, 1) is None  # nothing has dropped


def test_a_curve_needs_its_dense_point():
    with pytest.raises(ValueError, match="sparsity 0"):
        drop_point({0.1: 1.0}, 1)


def test_what_is_lost_is_a_share_of_the_dense_quality():
    assert drop(0.5, 0.4, 1) == pytest.approx(0.2)
    assert drop(20, 22, -1) == pytest.approx(0.1)
    assert drop(0.5, 0.6, 1) == pytest.approx(-0.2)
    assert drop(0, 0, 1) == 0
    assert drop(0, 0.1, -1) == math.inf
    assert matches(0.4, 0.4, 1, 0)
    assert not matches(0, 0.1, -1)


def test_the_knee_is_furthest_from_the_chord():
    assert knee({s: broken(0.6, 1)(s) for s in GRID}) == 0.6
    assert knee({s: s for s in GRID}) == 0
    assert knee({0.0: 1.0, 0.5: 1.0}) == 0
    with pytest.raises(ValueError, match="two points"):
        knee({0.0: 1.0})


def test_rank_correlation_by_hand_and_none_of_constants():
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40])[0] == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1])[0] == pytest.approx(-1)
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4])[0] == pytest.approx(0.9486833)
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3])[0])
    assert math.isnan(spearman([1, 2], [1, 2])[0])
