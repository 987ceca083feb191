"""What the ratios that choose among local solutions share: the menu under a budget, the measuring
of assembled models, and the way back to counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from prunekit.activations.condensed import measure
from prunekit.errors import ConfigError, NeedsData
from prunekit.problem import Problem
from prunekit.selection.budgets import SHAPES_TELL, check_saved, prices_of
from prunekit.selection.levels import Choice, Menu, topped_up
from prunekit.selection.prices import Budgeted, Prices
from prunekit.types import Allocation, Group, LocalSolutions, SubLayer

Goal = Literal["kl", "acceptance", "perplexity"]
"""How near an assembled model is to the dense one, or how well it reads the text."""
TOP = 256
"""Probabilities of the dense model that are kept for each position."""


@dataclass(frozen=True)
class Levels:
    """The local solutions with their prices, and what may be saved of them."""

    problem: Problem
    solutions: LocalSolutions
    prices: Prices
    of: str
    budget: float

    @cached_property
    def sublayers(self) -> Sequence[SubLayer]:
        return self.solutions.sublayers

    @cached_property
    def menu(self) -> Menu:
        """Raises NeedsData where only shapes are known."""
        return Menu(
            tuple(s.errors for s in self.sublayers),
            tuple(
                tuple(self.prices.saves[s.group.name](n) for n in s.removed) for s in self.sublayers
            ),
            self.budget,
        )

    def counts(self, choice: Choice) -> dict[str, int]:
        """Units to remove by group, the levels' own."""
        return {s.group.name: s.removed[n] for s, n in zip(self.sublayers, choice, strict=True)}

    def allocation(self, choice: Choice, **notes: Any) -> Allocation:
        """The counts of a choice, the rest of the budget spent on single units; notes say the
        choice and the budget, predicted and measured.
        """
        counts = self.counts(choice)
        costs = {s.group.name: s.cost for s in self.sublayers}
        groups = (s.group for s in self.sublayers)
        highest = {g.name: min(self.solutions.most(g), g.units - 1) for g in groups}
        full = topped_up(counts, self.prices.saves, costs, highest, self.budget)
        predicted = self.prices.dense - self.prices.saved(full)
        found = {
            "levels": counts,
            "local_error": self.menu.error(choice),
            "budget": {"of": self.of, "dense": self.prices.dense, "predicted": predicted},
        }
        return Allocation(full, notes=found | notes, measure=self.prices.measure)


def levels_of(
    problem: Problem, groups: list[Group], target: float, of: Budgeted, request: Mapping[str, int]
) -> Levels:
    """Raises ConfigError where there are no local solutions to choose among, where they save
    nothing of such a budget, and where it is more than all that may go together; NeedsData where
    only weights can tell.
    """
    if problem.solutions is None:
        raise ConfigError(
            "this ratio chooses among local solutions: give pruner=database or sparse_database"
        )
    check_saved(groups, of)
    if of not in SHAPES_TELL and not problem.has_data:
        raise NeedsData(f"ratio.of={of} needs the weights")
    prices = prices_of(problem.model, groups, of, request, problem.remember)
    budget = target * prices.dense
    most = prices.saved({g.name: problem.solutions.most(g) for g in groups})
    if budget > most:
        raise ConfigError(
            f"ratio: {target} of {of} cannot be removed from {len(groups)} groups of which at "
            f"most {most / prices.dense:.1%} of it can go; lower ratio.target, exclude less, or "
            "let the pruner take more (pruner.kinds, pruner.targets, higher pruner.levels)"
        )
    return Levels(problem, problem.solutions, prices, of, budget)


@dataclass
class Fitness:
    """Measures assembled models on a few windows of the calibration text; lower is better. What was
    measured once is kept, in memory and in the cache.

    Attributes:
        goal: `kl` from the dense model in nats a token, 1 - the expected `acceptance` of its
            tokens, or log `perplexity`.
        window: tokens of a window.
        seed: of the order in which windows are taken: more tokens are the same ones and others.
    """

    levels: Levels
    goal: Goal
    window: int
    seed: int
    measured: dict[tuple[int, Choice], float] = field(default_factory=dict)
    tokens: int = 0
    """Read so far, by assembled models."""

    @cached_property
    def windows(self) -> Tensor:
        """(N, window) all there are, in the order in which they are taken."""
        text = self.levels.problem.tokens
        if text.shape[1] < self.window:
            raise ConfigError(
                f"ratio.window={self.window}: calibration samples have {text.shape[1]} tokens"
            )
        whole = text.shape[1] // self.window * self.window
        cut = text[:, :whole].reshape(-1, self.window)
        return cut[torch.from_numpy(np.random.default_rng(self.seed).permutation(len(cut)))]

    def count(self, tokens: int) -> int:
        """Windows that make up so many tokens, at least one. Raises ConfigError for more tokens
        than there are.
        """
        count = max(1, math.ceil(tokens / self.window))
        if count > len(self.windows):
            raise ConfigError(
                f"ratio.tokens={tokens}: the calibration text has {self.windows.numel()} tokens in "
                f"windows of {self.window}"
            )
        return count

    def reference(self, count: int) -> dict[str, Tensor]:
        """The dense model's distributions on the first `count` windows."""
        problem = self.levels.problem

        def compute() -> dict[str, Tensor]:
            return measure(problem.model, self.windows[:count], batch=4, top=TOP, name="dense")[0]

        return problem.remember(
            __name__, "fitness/dense", [self.window, self.seed, count, TOP], compute
        )

    def __call__(self, choices: Sequence[Choice], tokens: int) -> list[float]:
        """Of each choice, on so many tokens."""
        count = self.count(tokens)
        new = [c for c in dict.fromkeys(choices) if (count, c) not in self.measured]
        if new:
            found = self._measure(new, count)
            self.measured |= {(count, c): v for c, v in zip(new, found, strict=True)}
            self.tokens += len(new) * count * self.window
        return [self.measured[count, c] for c in choices]

    def _measure(self, choices: list[Choice], count: int) -> list[float]:
        levels = self.levels
        reference = self.reference(count)

        def compute() -> dict[str, Tensor]:
            values = []
            with levels.solutions.assembled() as put:
                for choice in choices:
                    put(choice)
                    _, means = measure(
                        levels.problem.model,
                        self.windows[:count],
                        batch=4,
                        top=TOP,
                        name="fitness",
                        reference=reference,
                    )
                    values.append(float(self._value(means)))
            return {"fitness": torch.tensor(values, dtype=torch.float64)}

        counts = [levels.counts(c) for c in choices]
        # Errors tell other solutions, as another version of a solver makes them.
        made = [*levels.solutions.key, [s.errors for s in levels.sublayers]]
        parts = [*made, self.goal, self.window, self.seed, count, TOP, counts]
        kept = levels.problem.remember(__name__, "fitness", parts, compute)
        values: list[float] = kept["fitness"].tolist()
        return values

    def _value(self, means: dict[str, Tensor]) -> Tensor:
        if self.goal == "acceptance":
            return 1 - means["acceptance"].mean()
        return means["kl" if self.goal == "kl" else "nll"].mean()
