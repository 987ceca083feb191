"""Two numbers, both better when lower: what is not dominated, how much of the plane it dominates,
and four searches for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Literal

import torch

from prunekit.errors import ConfigError
from prunekit.selection.subnets import Choice, Subnets

Point = tuple[float, float]
"""Loss and cost."""
Evaluate = Callable[[Choice], Point]
Search = Literal["random", "stratified", "local", "nsga2"]


def front(points: Sequence[Point]) -> list[int]:
    """Indices of the points that no other one dominates, by the second number; of equal ones the
    first.
    """
    found: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][1], points[i][0], i)):
        if not found or points[i][0] < points[found[-1]][0]:
            found.append(i)
    return found


def hypervolume(points: Sequence[Point], worst: Point) -> float:
    """Area that the points dominate, of what is better than `worst`."""
    area, ceiling = 0.0, worst[0]
    for i in front(points):
        x, y = points[i]
        if x < ceiling and y < worst[1]:
            area += (ceiling - x) * (worst[1] - y)
            ceiling = x
    return area


def check_search(search: Search) -> None:
    """Raises ConfigError where optuna is missing."""
    if search == "nsga2" and find_spec("optuna") is None:
        raise ConfigError(
            "pruner.search=nsga2 needs optuna, which is not installed: pip install "
            "'prunekit[search]'; or pruner.search=local"
        )


def searched(
    space: Subnets, evaluate: Evaluate, search: Search, samples: int, seed: int
) -> tuple[list[Choice], list[Point]]:
    """So many choices with their numbers, the whole network and the smallest one first.

    Args:
        search: `random` draws each by itself; `stratified` likewise, the share that goes spread
            evenly over the samples; `local` begins with networks of which every group lost the same
            share, up to half of `samples`, then takes neighbours of a random one that nothing
            dominates; `nsga2` (Deb et al., 2002, as optuna has it) begins with the same ones.
    """
    if search == "nsga2":
        return _nsga2(space, evaluate, samples, seed)
    begin = starts(space, samples // 2 if search == "local" else 2)
    generator = torch.Generator().manual_seed(seed)
    choices: list[Choice] = []
    points: list[Point] = []
    for i in range(samples):
        if i < len(begin):
            choice = begin[i]
        elif search == "random":
            choice = space.draw(generator)
        elif search == "stratified":
            place = torch.rand((), generator=generator) + i - len(begin)
            choice = space.draw(generator, place / (samples - len(begin)))
        else:
            best = front(points)
            parent = choices[best[int(torch.randint(len(best), (), generator=generator))]]
            choice = space.neighbour(parent, generator)
        choices.append(choice)
        points.append(evaluate(choice))
    return choices, points


def starts(space: Subnets, most: int) -> list[Choice]:
    """The whole network, the smallest, and others between them; two at least."""
    between = max(0, min(space.levels + 1, most) - 2)
    shares = [0.0, 1.0, *((i + 1) / (between + 1) for i in range(between))]
    return list(dict.fromkeys(map(space.even, shares)))


def _nsga2(
    space: Subnets, evaluate: Evaluate, samples: int, seed: int
) -> tuple[list[Choice], list[Point]]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    population = max(2, min(50, samples // 4))
    sampler = optuna.samplers.NSGAIISampler(population_size=population, seed=seed)
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    names = [str(i) for i in range(len(space.coordinates))]
    ranges: dict[str, optuna.distributions.BaseDistribution] = {
        name: optuna.distributions.IntDistribution(0, most)
        for name, most in zip(names, space.coordinates, strict=True)
    }
    for choice in starts(space, samples // 2):
        study.enqueue_trial(dict(zip(names, choice, strict=True)))
    choices: list[Choice] = []
    points: list[Point] = []
    for _ in range(samples):
        trial = study.ask(ranges)
        choices.append(tuple(trial.params[name] for name in names))
        points.append(evaluate(choices[-1]))
        study.tell(trial, points[-1])
    return choices, points
