"""Puzzle's mixed-integer programme (Bercovich et al., 2024, arXiv 2411.19146) over the local errors
of a database: the exact optimum of their sum under a budget, depth and width together.
"""

from __future__ import annotations

import dataclasses

from prunekit.problem import Problem
from prunekit.ratios.level_search import levels_of
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

    For `pruner=database` and `sparse_database`. Single units take up what is left of the budget.
    Notes have the front of budget and error. Raises ConfigError where the budget cannot be met.
    """
    levels = levels_of(problem, groups, target, of, request)
    menu = levels.menu
    smaller = (dataclasses.replace(menu, budget=menu.budget * k / FRONT) for k in range(1, FRONT))
    choices = [lowest_error(m) for m in (*smaller, menu)]
    front = [[menu.saved(c) / levels.prices.dense, menu.error(c)] for c in choices]
    return levels.allocation(choices[-1], front=front)
