"""Choosing one level for each sub-layer under a budget: the integer programme, moves that keep the
budget, and single units for what is left of it. Nothing here knows a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from prunekit.errors import ConfigError

Choice = tuple[int, ...]
"""A level of each sub-layer, in their order."""
Price = Callable[[int], float]
"""What removing so many units of a group saves."""
ROUNDING = 1e-9
"""Of a sum, relative: budgets are sums too."""


@dataclass(frozen=True)
class Menu:
    """What there is to choose from.

    Attributes:
        errors: of each sub-layer at each level.
        saves: what each level saves, ascending from 0.
        budget: to save, at most; choices come as near as one step up allows.
    """

    errors: tuple[tuple[float, ...], ...]
    saves: tuple[tuple[float, ...], ...]
    budget: float

    @cached_property
    def most(self) -> float:
        """What a choice may save: the budget and its rounding."""
        return self.budget + ROUNDING * max(1.0, abs(self.budget))

    def saved(self, choice: Sequence[int]) -> float:
        """What a choice saves."""
        return sum(s[level] for s, level in zip(self.saves, choice, strict=True))

    def error(self, choice: Sequence[int]) -> float:
        """The local errors of a choice, summed."""
        return sum(e[level] for e, level in zip(self.errors, choice, strict=True))

    def steps_up(self, choice: Sequence[int]) -> list[int]:
        """Sub-layers that can lose a level more within the budget, and save something by it."""
        left = self.most - self.saved(choice)
        return [
            i
            for i, (s, level) in enumerate(zip(self.saves, choice, strict=True))
            if level + 1 < len(s) and 0 < s[level + 1] - s[level] <= left
        ]


def lowest_error(menu: Menu) -> Choice:
    """The choice of the least summed error among those that save the budget but for less than the
    smallest step: a mixed-integer programme, solved exactly (as Puzzle, arXiv 2411.19146).

    Where no choice comes so near, the distance is doubled until one does. Raises ConfigError where
    none at all is within the budget.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    errors, saves = np.concatenate(menu.errors), np.concatenate(menu.saves)
    owner = np.repeat(np.arange(len(menu.saves)), [len(s) for s in menu.saves])
    one_each = (owner[None] == np.arange(len(menu.saves))[:, None]).astype(float)
    scale = max(1.0, menu.budget)
    steps = [float(np.diff(s).max()) for s in menu.saves if len(s) > 1]
    step = min((s for s in steps if s > 0), default=0.0)
    distance = (1 - 1e-6) * step  # a whole step below, it would fit
    margin = 0.0  # the solver's own tolerance may let a choice save too much
    while True:
        least, most = (menu.budget - distance) / scale, menu.most / scale - margin
        rules = [
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(saves[None] / scale, least, most),
        ]
        found = milp(
            errors, integrality=np.ones(len(errors)), bounds=Bounds(0, 1), constraints=rules
        )
        if found.x is None:
            if distance > menu.budget:
                raise ConfigError("no choice of levels is within the budget")
            distance = max(2 * distance, menu.budget * 1e-6)
            continue
        first = np.searchsorted(owner, np.arange(len(menu.saves)))
        choice = tuple(int(n) for n in np.flatnonzero(found.x > 0.5) - first)
        if menu.saved(choice) <= menu.most:
            return choice
        margin += 1e-7


def filled(menu: Menu, choice: Sequence[int], rng: np.random.Generator) -> Choice:
    """`choice` brought to the budget by random single steps: down while it saves too much, then up
    while one fits.
    """
    levels = list(choice)
    while menu.saved(levels) > menu.most:
        levels[int(rng.choice([i for i, level in enumerate(levels) if level]))] -= 1
    while up := menu.steps_up(levels):
        levels[int(rng.choice(up))] += 1
    return tuple(levels)


def even(menu: Menu, rng: np.random.Generator) -> Choice:
    """The same share of what each sub-layer can save, as far as its levels allow, and random steps
    for the rest of the budget.
    """

    def at(share: float) -> list[int]:
        return [max(i for i, x in enumerate(s) if x <= share * s[-1]) for s in menu.saves]

    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if menu.saved(at(middle)) <= menu.most else (low, middle)
    return filled(menu, at(low), rng)


def random_choice(menu: Menu, rng: np.random.Generator) -> Choice:
    """Levels drawn uniformly wherever they save something, brought to the budget."""
    drawn = [int(rng.integers(len(s))) if s[-1] > 0 else 0 for s in menu.saves]
    return filled(menu, drawn, rng)


def switched(menu: Menu, choice: Choice, rng: np.random.Generator, switches: int) -> Choice:
    """EvoPress's move (arXiv 2410.14649): `switches` times one sub-layer gives a level back and
    another one loses one, then the rest of the budget is filled.
    """
    levels = list(choice)
    for _ in range(switches):
        down = [i for i, level in enumerate(levels) if level]
        up = [
            i
            for i, s in enumerate(menu.saves)
            if levels[i] + 1 < len(s) and s[levels[i] + 1] > s[levels[i]]
        ]
        if not down or not up:
            break
        a, b = int(rng.choice(down)), int(rng.choice(up))
        levels[a] -= 1
        levels[b] += 1
    return filled(menu, levels, rng)


def topped_up(
    counts: Mapping[str, int],
    prices: Mapping[str, Price],
    costs: Mapping[str, Callable[[int], float]],
    highest: Mapping[str, int],
    budget: float,
) -> dict[str, int]:
    """`counts` with the rest of `budget` spent on single units, where they cost least for what they
    save: no further unit fits then, or counts are at their `highest`; of those above, nothing more
    goes.

    `costs[name](n)` is what removing n units costs in all.
    """
    counts = dict(counts)
    most = budget + ROUNDING * max(1.0, abs(budget))
    while True:
        left = most - sum(prices[name](n) for name, n in counts.items())
        best: tuple[float, str, int] | None = None
        for name, n in counts.items():
            more = _as_many(prices[name], n, highest[name], left)
            saved = prices[name](more) - prices[name](n)
            if more > n and saved > 0:
                price = (costs[name](more) - costs[name](n)) / saved
                best = min(best or (price, name, more), (price, name, more))
        if best is None:
            return counts
        counts[best[1]] = best[2]


def _as_many(price: Price, n: int, most: int, left: float) -> int:
    """The largest count of at most `most` units that saves no more than `left` beyond `n`."""
    low, high = n, max(n, most)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if price(middle) - price(n) <= left else (low, middle - 1)
    return low
