"""EvoESAP (arXiv 2603.06003): how many experts each layer loses, searched by evolution, while the
criterion says which of a layer go first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from tqdm import tqdm

from prunekit import graph
from prunekit.errors import ConfigError, NeedsData
from prunekit.graph.discovery import discovery
from prunekit.problem import Problem
from prunekit.ratios.level_search import Fitness, Goal, Levels
from prunekit.registry import Length, Natural, Positive, Seed, Share, ratios
from prunekit.selection.levels import Choice
from prunekit.selection.prices import parameter_prices
from prunekit.selection.shares import units_removed
from prunekit.types import Allocation, Group, SubLayer

Several = Annotated[int, Field(ge=2)]


@dataclass(frozen=True)
class RankedExperts:
    """Experts that go in the order of their scores, as local solutions: level n lacks n of them."""

    model: nn.Module
    groups: list[Group]
    orders: Mapping[str, Tensor]

    @property
    def key(self) -> Sequence[Any]:
        return [self.orders[g.name].tolist() for g in self.groups]

    @property
    def sublayers(self) -> Sequence[SubLayer]:
        return [
            SubLayer(g, tuple(range(g.units)), (0.0,) * g.units, lambda removed: 0.0)
            for g in self.groups
        ]

    def most(self, group: Group) -> int:
        return group.units - 1

    @contextmanager
    def assembled(self) -> Iterator[Callable[[Sequence[int]], None]]:
        """Experts that are gone cannot be picked, as if they were removed."""
        device = next(self.model.parameters()).device
        z = {g.name: torch.ones(g.units, device=device) for g in self.groups}

        def put(choice: Sequence[int]) -> None:
            for g, n in zip(self.groups, choice, strict=True):
                z[g.name].fill_(1)[self.orders[g.name][:n].to(device)] = 0

        with graph.gated(self.model, self.groups, z):
            yield put


@ratios.register(paper="arXiv 2603.06003", year=2026, needs="data")
@torch.no_grad()
def expert_evolution(
    problem: Problem,
    groups: list[Group],
    *,
    target: Share = 0.25,
    population: Several = 16,
    generations: Natural = 20,
    parents: Positive = 4,
    moved: Positive = 4,
    moves: Positive = 3,
    tokens: Positive = 2048,
    goal: Goal = "acceptance",
    window: Length = 128,
    seed: Seed = 0,
) -> Allocation:
    """How many experts each layer loses, as many in all as by the same share of every layer: counts
    are moved between layers while the model comes nearer to the dense one.

    Args:
        target: share of the experts that goes.
        population: of choices in a generation.
        generations: 0 gives the same share to every layer, with which the search begins.
        parents: best choices, which stay and have children.
        moved: experts at most that one layer loses instead of another in one move.
        moves: of a child, at most.
        tokens: of the calibration text that every choice is judged on.
        goal: what is best: highest expected `acceptance` of the dense model's tokens, least `kl`
            from it, least `perplexity`.
        window: tokens side by side.
        seed: of the moves and of the text.

    Which of a layer's experts go is the criterion's say, on the dense model; no layer keeps fewer
    than its router picks. The authors take 32 choices, 50 generations, 64 samples. Notes have the
    fitness after each generation, lower is better. Raises ConfigError for other units than experts,
    and for as many parents as a generation has choices.
    """
    other = next((g for g in groups if g.kind != "experts"), None)
    if other is not None:
        raise ConfigError(
            f"ratio=expert_evolution counts experts, and {other.name} is of kind {other.kind}: "
            "give pruner.kinds=[experts]"
        )
    if parents >= population:
        raise ConfigError(
            f"ratio.parents={parents} leave no room for children in ratio.population={population}: "
            f"at most {population - 1}"
        )
    if not problem.has_data:
        raise NeedsData("ratio=expert_evolution needs the weights and the text")
    start = tuple(units_removed(g, target, "removed") for g in groups)
    if not any(start) or not generations or len(groups) == 1:
        return Allocation({g.name: n for g, n in zip(groups, start, strict=True)})
    scores = problem.score(groups, problem.run())
    orders = {name: s.cpu().argsort(stable=True) for name, s in scores.items()}
    least = discovery(problem.model).least
    most = [g.units - least.get(g.name, 1) for g in groups]
    prices = parameter_prices(problem.model, groups, "model")
    ranked = RankedExperts(problem.model, groups, orders)
    fitness = Fitness(Levels(problem, ranked, prices, "units", sum(start)), goal, window, seed)
    rng = np.random.default_rng(seed)
    best: list[Choice] = [start]
    trace: list[float] = []
    for _ in tqdm(range(generations), desc="counts of experts", unit="generation"):
        children = [
            moved_counts(best[int(rng.integers(len(best)))], most, moved, moves, rng)
            for _ in range(population - len(best))
        ]
        choices = list(dict.fromkeys([*best, *children]))
        values = dict(zip(choices, fitness(choices, tokens), strict=True))
        trace = trace or [values[start]]
        best = sorted(choices, key=values.__getitem__)[:parents]
        trace.append(values[best[0]])
    counts = {g.name: n for g, n in zip(groups, best[0], strict=True)}
    notes = {"expert_evolution": {"uniform": trace[0], "found": trace[-1], "trace": trace[1:]}}
    return Allocation(counts, notes=notes)


def moved_counts(
    counts: Choice, most: Sequence[int], moved: int, moves: int, rng: np.random.Generator
) -> Choice:
    """A child: one to `moves` times a layer loses up to `moved` experts more and another as many
    less; the total stays, between 0 and `most` of each layer.
    """
    new = list(counts)
    for _ in range(int(rng.integers(1, moves + 1))):
        give, take = (int(i) for i in rng.choice(len(new), 2, replace=False))
        room = min(new[give], most[take] - new[take], moved)
        if room > 0:
            n = int(rng.integers(1, room + 1))
            new[give] -= n
            new[take] += n
    return tuple(new)
