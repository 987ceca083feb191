"""Puzzle's mixed-integer programme (Bercovich et al., 2024, arXiv 2411.19146) over structured OBS's
local errors: the exact optimum of their sum under a budget, depth and width together.
"""

from __future__ import annotations

import dataclasses

from prunekit.problem import Problem
from prunekit.ratios.level_search import Levels, levels_of
from prunekit.registry import Share, ratios
from prunekit.selection.levels import lowest_error
from prunekit.selection.prices import REQUEST, Budgeted, Request
from prunekit.types import Allocation, Group

FRONT = 10
"""Budgets of which the notes have the optimum."""


@ratios.register(paper="arXiv 2411.19146", year=2024, needs="data")
def milp(
    problem: Problem,
    groups: list[Group],
    *,
    target: Share = 0.2,
    of: Budgeted = "model",
    request: Request = REQUEST,
) -> Allocation:
    """Takes the levels of a database whose local errors sum to the least within a budget: an
    integer programme, solved exactly.

    Args:
        target: share of the budget that goes.
        of: of what: parameters (`model`; `prunable`, those that may go), `memory_mib` of weights,
            MiB of the `kv_cache`, `macs` of a prompt, `latency_ms` of a request.
        request: the prompt and the request of the last three.

    For `pruner=database`. Single units take up what is left of the budget. Notes have the front of
    budget and error. Raises ConfigError where the budget cannot be met.
    """
    levels = levels_of(problem, groups, target, of, request)
    return levels.allocation(lowest_error(levels.menu), front=front(levels))


def front(levels: Levels) -> list[list[float]]:
    """[share saved, summed local error] of the optimum of budgets up to the one that is asked
    for.
    """
    points = []
    for k in range(1, FRONT + 1):
        menu = dataclasses.replace(levels.menu, budget=levels.budget * k / FRONT)
        choice = lowest_error(menu)
        points.append([menu.saved(choice) / levels.prices.dense, menu.error(choice)])
    return points
