"""Random levels: what a search has to beat at the same cost."""

from __future__ import annotations

import numpy as np
from tqdm import tqdm

from prunekit.problem import Problem
from prunekit.ratios.level_search import Fitness, Goal, levels_of
from prunekit.registry import Length, Positive, Seed, Share, ratios
from prunekit.selection.levels import random_choice
from prunekit.selection.prices import REQUEST, Budgeted, Request
from prunekit.types import Allocation, Group


@ratios.register(paper="-", year=2024, needs="data")
def random(
    problem: Problem,
    groups: list[Group],
    *,
    target: Share = 0.2,
    of: Budgeted = "model",
    request: Request = REQUEST,
    samples: Positive = 32,
    goal: Goal = "kl",
    tokens: Positive = 2048,
    window: Length = 128,
    seed: Seed = 0,
) -> Allocation:
    """Draws levels of a database at random within a budget and takes the best of the models that
    they make: the control of every search.

    Args:
        target: share of the budget that goes.
        of: of what: parameters (`model`; `prunable`, those that may go), `memory_mib` of weights,
            MiB of the `kv_cache`, `macs` of a prompt, `latency_ms` of a request.
        request: the prompt and the request of the last three.
        samples: choices that are drawn; of a single one nothing is measured.
        goal: what is best: least `kl` from the dense model, highest expected `acceptance` of its
            tokens, least `perplexity`.
        tokens: of the calibration text that each model reads.
        window: tokens side by side.
        seed: of the draws and of the text.

    For `pruner=database` and `sparse_database`. Raises ConfigError where the budget cannot be met.
    """
    levels = levels_of(problem, groups, target, of, request)
    rng = np.random.default_rng(seed)
    choices = [random_choice(levels.menu, rng) for _ in range(samples)]
    if samples == 1:
        return levels.allocation(choices[0])
    fitness = Fitness(levels, goal, window, seed)
    values: list[float] = []
    bar = tqdm(choices, desc="random levels", unit="model")
    for choice in bar:
        values += fitness([choice], tokens)
        bar.set_postfix(best=f"{min(values):.4f}")
    best = int(np.argmin(values))
    return levels.allocation(choices[best], fitness=values[best], sampled=values)
