"""Levels under a budget: the programme's optimum is brute force's, moves keep the budget."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from prunekit.errors import ConfigError
from prunekit.selection.levels import (
    Menu,
    even,
    filled,
    lowest_error,
    random_choice,
    switched,
    topped_up,
)


def menu(seed: int, budget: float = 20.0) -> Menu:
    """Four sub-layers of three to five levels, of two sizes of step; errors need not be convex."""
    rng = np.random.default_rng(seed)
    sizes = [(5, 3.0), (3, 4.0), (4, 3.0), (3, 4.0)]
    errors = [(0.0, *np.cumsum(rng.exponential(size=n - 1)).tolist()) for n, _ in sizes]
    return Menu(
        tuple(errors), tuple(tuple(step * k for k in range(n)) for n, step in sizes), budget
    )


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("budget", [7.0, 20.0, 26.5])
def test_the_optimum_is_that_of_brute_force(seed, budget):
    given = menu(seed, budget)
    every = itertools.product(*(range(len(s)) for s in given.saves))
    possible = [c for c in every if budget - 3 < given.saved(c) <= budget]
    assert given.error(lowest_error(given)) == pytest.approx(min(map(given.error, possible)))


def test_an_optimum_may_lie_off_the_hull():
    """Two cheap steps that only come together."""
    given = Menu(((0.0, 5.0, 5.5), (0.0, 1.0, 9.0)), ((0.0, 1.0, 2.0), (0.0, 1.0, 2.0)), 2.0)
    assert lowest_error(given) == (2, 0)


def test_the_solvers_tolerance_is_not_spent():
    """Twenty parameters of a hundred million too many."""
    given = Menu(((0.0, 1.0), (0.0, 5.0)), ((0.0, 1e8), (0.0, 1e8 - 50)), 1e8 - 20)
    assert lowest_error(given) == (0, 1)


def test_nothing_and_everything():
    assert lowest_error(menu(0, 0.0)) == (0, 0, 0, 0)
    whole = menu(0)
    most = whole.saved([len(s) - 1 for s in whole.saves])
    assert lowest_error(menu(0, most)) == (4, 2, 3, 2)
    with pytest.raises(ConfigError, match="within the budget"):
        lowest_error(menu(0, -1.0))


def test_every_move_comes_as_near_to_the_budget_as_a_step_allows():
    rng = np.random.default_rng(0)
    given = menu(1, 20.0)
    choice = lowest_error(given)
    for _ in range(200):
        for made in (
            switched(given, choice, rng, 2),
            random_choice(given, rng),
            even(given, rng),
            filled(given, [4, 2, 3, 2], rng),
            filled(given, [0, 0, 0, 0], rng),
        ):
            assert given.saved(made) <= 20.0
            assert not given.steps_up(made)
            assert all(0 <= level < len(s) for level, s in zip(made, given.saves, strict=True))
        choice = made


def test_equal_shares_of_what_each_can_save():
    steps = tuple(tuple(x * k for k in range(9)) for x in (10.0, 2.0, 1.0))
    given = Menu(((0.0,) * 9,) * 3, steps, 0.5 * 8 * 13)
    assert even(given, np.random.default_rng(0)) == (4, 4, 4)


def test_moves_reach_every_choice():
    rng = np.random.default_rng(0)
    given = menu(2, 14.0)
    every = itertools.product(*(range(len(s)) for s in given.saves))
    full = {c for c in every if given.saved(c) <= 14 and not given.steps_up(c)}
    seen, choice = set(), lowest_error(given)
    for _ in range(3000):
        choice = switched(given, choice, rng, 1)
        seen.add(choice)
    assert seen == full


def test_single_units_take_up_the_rest_where_they_cost_least():
    counts = {"a": 2, "b": 0, "gone": 10}
    prices = {name: (lambda n: 3.0 * n) for name in ("a", "b")} | {"gone": lambda n: 100.0 * n}
    costs = {"a": float, "b": lambda n: n / 10, "gone": lambda n: 0.0}
    highest = {"a": 9, "b": 9, "gone": 9}
    found = topped_up(counts, prices, costs, highest, 1000 + 6 + 3 * 5 + 2)
    assert found == {"a": 2, "b": 5, "gone": 10}
    full = topped_up(counts, prices, costs, highest, 1e6)
    assert full == {"a": 9, "b": 9, "gone": 10}
