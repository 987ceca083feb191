"""A budget of parameters spent wherever it costs least (ZipLM, arXiv 2302.04089, section 3.2, by
the hull of each cost curve instead of its dynamic programme).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from prunekit.activations.blockwise import iterate_blocks
from prunekit.activations.dense_reference import (
    UnitReader,
    check_readers,
    forward_until,
    readers_by_block,
    token_weights,
)
from prunekit.activations.gram import GramStatistics
from prunekit.activations.storage import PassOptions, Precision, Store, resolved
from prunekit.architecture.sizes import Sizes
from prunekit.errors import ConfigError
from prunekit.problem import Problem
from prunekit.registry import Above, InnerRatio, Positive, Share, ratios
from prunekit.selection.budget import cheapest
from prunekit.selection.shares import uniform_counts
from prunekit.solvers.least_squares import prior_ridge, ridge_problem
from prunekit.solvers.obs import greedy_removal
from prunekit.types import Allocation, Group, Of


@ratios.register(paper="arXiv 2302.04089", year=2023, needs="data")
@torch.no_grad()
def cost(
    problem: Problem,
    groups: list[Group],
    *,
    target: Share | None = 0.2,
    of: Of = "model",
    inner: InnerRatio = None,
    cost_tokens: Positive = 16384,
    bias: bool = True,
    token_weight: Literal["relative", "equal"] = "relative",
    ridge: Above | Literal["auto"] = "auto",
    store: Store = "memory",
    precision: Precision = "fast",
) -> Allocation:
    """Spends the parameters that a uniform ratio, or an `inner` one, would remove wherever heads
    and neurons cost least by structured OBS on the dense model.

    Args:
        target: what the uniform ratio removes; null with an `inner` ratio.
        of: what `target` is the share of.
        inner: another ratio whose parameters are spent, e.g. {name: owl, target: 0.3}.
        cost_tokens: the first so many calibration tokens tell the costs.
        bias: of the regression, as in pruner=obs.
        token_weight: likewise.
        ridge: of the regression, in tokens; `auto` takes four for every input.
        store: where activations between blocks wait.
        precision: of the forwards.

    Raises ConfigError for units that no linear module of a block reads.
    """
    if (inner is None) == (target is None):
        raise ConfigError("ratio=cost spends ratio.target or what ratio.inner removes: give one")
    model = problem.model
    sizes = Sizes(model, groups)
    if inner is not None:
        counts = inner(problem, groups).counts
    else:
        counts = uniform_counts(model, groups, target or 0.0, of)
    readers = readers_by_block(model, problem.blocks(), problem.everything())
    check_readers(groups, readers)
    tokens = problem.tokens  # where only shapes are known, this says so
    if not any(counts.values()):
        return Allocation(counts)
    first = tokens[: max(1, cost_tokens // tokens.shape[1])]
    costs = {}
    relative = token_weight == "relative"
    passes = iterate_blocks(model, problem.blocks(), first, PassOptions(store, precision))
    for row, run in zip(readers, passes, strict=True):
        inside = [r.inside for r in row]
        stats = {
            r.inside: GramStatistics(
                r.reader.weight.shape[1],
                0,
                r.reader.weight.device,
                resolved(precision, r.reader.weight.device) == "bf16",
            )
            for r in row
        }
        for i, rows in enumerate(run.feed.rows):
            seen = forward_until(run.feed, run.module, run.block, i, run.inputs[rows], inside)
            for r in row:
                weights = token_weights(seen.after[r.inside], relative)
                stats[r.inside].add(seen.x[r.inside], None, weights)
        for r in row:
            if r.group.name in counts:
                costs[r.group.name] = removal_costs(r, stats[r.inside], ridge, bias)
    per_unit = {g.name: sizes.removed({g.name: 1}) for g in groups}
    return Allocation(cheapest(costs, per_unit, sizes.removed(counts)))


def removal_costs(
    r: UnitReader, stats: GramStatistics, ridge: float | Literal["auto"], bias: bool
) -> Tensor:
    """(U,) what removing 1, 2, .. units costs on the dense model, per token."""
    W = r.reader.weight
    tokens = prior_ridge(W.shape[1]) if ridge == "auto" else ridge
    inverse = ridge_problem(stats, W, tokens, bias).inverse()
    _, costs = greedy_removal(W, inverse, r.reader.member.index, r.group.units)
    return torch.tensor(costs).cumsum(0) / stats.tokens
