"""An accuracy predictor (arXiv 2309.09507): gradient-boosted trees learn from measured models which
levels are good, many more are judged by them, and the best of those are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from tqdm import tqdm

from prunekit.problem import Problem
from prunekit.ratios.level_search import Fitness, Goal, Levels, levels_of
from prunekit.registry import Length, Natural, Positive, Seed, Share, ratios
from prunekit.selection.levels import Choice, Menu, lowest_error, random_choice, switched
from prunekit.selection.prices import REQUEST, Budgeted, Request
from prunekit.types import Allocation, Group

FEWEST = 10
"""Samples that trees can learn from, and of which some can be held out."""
Samples = Annotated[int, Field(ge=FEWEST)]
HELD_OUT = 0.3
"""Share of the samples, as in the paper."""
POOL, CHILDREN = 16, 128
"""Choices that stay from one round of the search to the next, and new ones in each."""
FARTHEST = 12
"""Switches of a sample away from the integer programme's choice, at most."""


@ratios.register(paper="arXiv 2309.09507", year=2023, needs="data")
def predictor(
    problem: Problem,
    groups: list[Group],
    *,
    target: Share = 0.2,
    of: Budgeted = "model",
    request: Request = REQUEST,
    samples: Samples = 64,
    rounds: Natural = 30,
    verified: Positive = 8,
    goal: Goal = "perplexity",
    tokens: Positive = 2048,
    window: Length = 128,
    seed: Seed = 0,
) -> Allocation:
    """Learns from measured models how good the levels of a database are together, searches by what
    it learned within a budget, and takes the best of what is measured then.

    Args:
        target: share of the budget that goes.
        of: of what: parameters (`model`; `prunable`, those that may go), `memory_mib` of weights,
            MiB of the `kv_cache`, `macs` of a prompt, `latency_ms` of a request.
        request: the prompt and the request of the last three.
        samples: models that are measured to learn from, all within the budget: half at random, half
            some switches away from the choice of ratio=milp.
        rounds: of the search by what was learned; 0 takes the best of the samples.
        verified: choices of the search that are measured.
        goal: what is learned: log `perplexity` (the paper), `kl` from the dense model, expected
            `acceptance` of its tokens.
        tokens: of the calibration text that a model reads.
        window: tokens side by side.
        seed: of the samples, the trees and the text.

    For `pruner=database` and `sparse_database`. Notes have Kendall's tau on the third of the
    samples that was held out, and what was predicted and measured of the choices verified. Raises
    ConfigError where the budget cannot be met.
    """
    levels = levels_of(problem, groups, target, of, request)
    rng = np.random.default_rng(seed)
    fitness = Fitness(levels, goal, window, seed)
    choices = sampled(levels.menu, samples, rng)
    values: list[float] = []
    bar = tqdm(choices, desc="predictor", unit="model")
    for choice in bar:
        values += fitness([choice], tokens)
        bar.set_postfix(best=f"{min(values):.4f}")
    known = dict(zip(choices, values, strict=True))
    if len(choices) < FEWEST:  # so small a budget that these are all there are
        chosen = min(known, key=known.__getitem__)
        return levels.allocation(chosen, fitness=known[chosen], tau=None, sampled=values)
    tau = held_out_tau(levels, choices, values, seed, rng)
    trees = trees_of(features(levels, choices), np.array(values), seed)

    def predict(of: Sequence[Choice]) -> NDArray[np.float64]:
        found: NDArray[np.float64] = trees.predict(features(levels, of))
        return found

    best = searched(levels.menu, predict, known, rounds, verified, rng)
    measured = fitness(list(best), tokens)
    known |= dict(zip(best, measured, strict=True))
    chosen = min(known, key=known.__getitem__)
    return levels.allocation(
        chosen,
        fitness=known[chosen],
        tau=tau,
        sampled=values,
        verified=[[p, m] for p, m in zip(best.values(), measured, strict=True)],
    )


def sampled(menu: Menu, count: int, rng: np.random.Generator) -> list[Choice]:
    """The integer programme's choice, others near it, and random ones; each once, as far as there
    are so many.
    """
    start = lowest_error(menu)
    found = {start: None}
    for i in range(20 * count):
        if len(found) == count:
            break
        switches = int(rng.integers(1, FARTHEST + 1))
        choice = random_choice(menu, rng) if i % 2 else switched(menu, start, rng, switches)
        found[choice] = None
    return list(found)


def features(levels: Levels, choices: Sequence[Choice]) -> NDArray[np.float64]:
    """(N, S + 1) the share of units that each sub-layer loses, and the log of the summed errors."""
    units = [s.group.units for s in levels.sublayers]
    rows = []
    for choice in choices:
        counts = levels.counts(choice).values()
        error = levels.menu.error(choice)
        rows.append([n / u for n, u in zip(counts, units, strict=True)] + [np.log(error + 1e-12)])
    return np.array(rows)


def trees_of(x: NDArray[np.float64], y: NDArray[np.float64], seed: int) -> Any:
    """Trees fitted to samples."""
    from sklearn.ensemble import GradientBoostingRegressor

    trees = GradientBoostingRegressor(
        n_estimators=300, learning_rate=0.05, max_depth=3, subsample=0.7, random_state=seed % 2**32
    )
    return trees.fit(x, y)


def held_out_tau(
    levels: Levels,
    choices: Sequence[Choice],
    values: Sequence[float],
    seed: int,
    rng: np.random.Generator,
) -> float | None:
    """Kendall's tau between predicted and measured, on samples that the trees did not see; None
    where all of them are alike.
    """
    from scipy.stats import kendalltau

    order = rng.permutation(len(choices))
    held = round(HELD_OUT * len(choices))
    test, train = order[:held], order[held:]
    x, y = features(levels, choices), np.array(values)
    tau = kendalltau(trees_of(x[train], y[train], seed).predict(x[test]), y[test]).statistic
    return None if np.isnan(tau) else float(tau)


def searched(
    menu: Menu,
    predict: Callable[[Sequence[Choice]], NDArray[np.float64]],
    known: dict[Choice, float],
    rounds: int,
    verified: int,
    rng: np.random.Generator,
) -> dict[Choice, float]:
    """The choices that `predict` finds best and that nobody measured, with what it says of them, by
    level switches from the best that were measured.
    """
    pool = sorted(known, key=known.__getitem__)[:POOL]
    seen: dict[Choice, float] = {}
    for _ in range(rounds):
        parents = [pool[int(i)] for i in rng.integers(len(pool), size=CHILDREN)]
        children = [switched(menu, p, rng, int(rng.integers(1, 4))) for p in parents]
        new = [c for c in dict.fromkeys(children) if c not in seen and c not in known]
        if new:
            seen |= {c: float(v) for c, v in zip(new, predict(new), strict=True)}
        pool = sorted(seen, key=seen.__getitem__)[:POOL] or pool
    return {c: seen[c] for c in sorted(seen, key=seen.__getitem__)[:verified]}
