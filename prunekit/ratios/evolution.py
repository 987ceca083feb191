"""EvoPress (Sieberling et al., 2024, arXiv 2410.14649) over the levels of a database, sparsities of
matrices, or attention and feed-forward and whole sub-layers together as Tyr-the-Pruner (arXiv
2503.09657) and DarwinLM (arXiv 2502.07780) do: levels are switched, and few tokens sort out what
more tokens decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field
from tqdm import tqdm

from prunekit.problem import Problem
from prunekit.ratios.level_search import Fitness, Goal, levels_of
from prunekit.registry import Length, Natural, Positive, Seed, Share, ratios
from prunekit.selection.levels import Choice, Menu, even, lowest_error, switched
from prunekit.selection.prices import REQUEST, Budgeted, Request
from prunekit.types import Allocation, Group

Stages = Annotated[list[Positive], Field(min_length=1)]
SWITCHES = 3
"""At most, of one child; the lower of two draws, so that few are usual."""


@ratios.register(paper="arXiv 2410.14649, 2503.09657", year=2024, needs="data")
def evolution(
    problem: Problem,
    groups: list[Group],
    *,
    target: Share = 0.2,
    of: Budgeted = "model",
    request: Request = REQUEST,
    generations: Natural = 30,
    offspring: Positive = 16,
    tokens: Stages = [512, 2048],  # noqa: B006 (never mutated; the YAML states it)
    goal: Goal = "kl",
    window: Length = 128,
    seed: Seed = 0,
) -> Allocation:
    """Switches levels of a database between sub-layers, within a budget, while the model that they
    make comes nearer to the dense one.

    Args:
        target: share of the budget that goes.
        of: of what: parameters (`model`; `prunable`, those that may go), `memory_mib` of weights,
            MiB of the `kv_cache`, `macs` of a prompt, `latency_ms` of a request.
        request: the prompt and the request of the last three.
        generations: of children; the first parent is the choice of ratio=milp, or where that model
            is nearer the same share of every part.
        offspring: children in a generation.
        tokens: of the calibration text that a model reads: all children the first number, the best
            quarter of them the next one, and so on; the last number decides.
        goal: what is best: least `kl` from the dense model, highest expected `acceptance` of its
            tokens, least `perplexity`.
        window: tokens side by side.
        seed: of the switches and of the text.

    For `pruner=database` and `sparse_database`. A search that was cut off goes on where it was:
    what was measured lies in the cache. Notes have the fitness after each generation beside the
    tokens read. Raises ConfigError where the budget cannot be met.
    """
    levels = levels_of(problem, groups, target, of, request)
    rng = np.random.default_rng(seed)
    fitness = Fitness(levels, goal, window, seed)
    parent = lowest_error(levels.menu)
    trace: list[list[float]] = []
    bar = tqdm(range(generations), desc="evolution", unit="generation")
    for _ in bar:
        if not trace:
            starts = [parent, even(levels.menu, rng)]
            values = fitness(starts, tokens[-1])
            parent = starts[values.index(min(values))]
            trace.append([0, min(values)])
        children = [mutated(levels.menu, parent, rng) for _ in range(offspring)]
        parent, value = survivor(fitness, parent, children, tokens)
        trace.append([fitness.tokens, value])
        bar.set_postfix(fitness=f"{value:.4f}", start=f"{trace[0][1]:.4f}")
    return levels.allocation(parent, trace=trace)


def mutated(menu: Menu, parent: Choice, rng: np.random.Generator) -> Choice:
    """A child: one to three switches away."""
    return switched(menu, parent, rng, int(rng.integers(1, SWITCHES + 1, 2).min()))


def survivor(
    fitness: Fitness, parent: Choice, children: list[Choice], tokens: Sequence[int]
) -> tuple[Choice, float]:
    """The best of a generation by the last number of tokens, and its fitness; the parent competes
    at every stage.
    """
    left = [c for c in dict.fromkeys(children) if c != parent]
    for i, count in enumerate(tokens):
        values = fitness([parent, *left], count)
        order = sorted(range(len(left)), key=lambda k: values[k + 1])
        if i + 1 < len(tokens):
            left = [left[k] for k in order[: max(1, len(left) // 4)]]
    best = min(range(len(left) + 1), key=values.__getitem__)
    return [parent, *left][best], values[best]
