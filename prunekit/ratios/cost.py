"""A budget of parameters spent wherever it costs least (ZipLM, arXiv 2302.04089, section 3.2, by
the hull of each cost curve instead of its dynamic programme).
"""

from __future__ import annotations

import hashlib
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from prunekit.activations.blockwise import BlockRun, iterate_blocks
from prunekit.activations.dense_reference import (
    UnitReader,
    check_readers,
    forward_until,
    readers_by_block,
    token_weights,
)
from prunekit.activations.done_blocks import Outcome, packed, unpacked
from prunekit.activations.gram import GramStatistics
from prunekit.activations.storage import PassOptions, Precision, Store
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
    costs: dict[str, Tensor] = {}
    relative, options = token_weight == "relative", PassOptions(store, precision)
    # An inner ratio may have a pass of this kind too.
    which = (cost_tokens, relative, ridge, bias, sorted(counts))
    done = problem.done_blocks(f"costs-{hashlib.sha256(repr(which).encode()).hexdigest()[:8]}-")
    passes = iterate_blocks(model, problem.blocks(), first, options, done)
    for row, run in zip(readers, passes, strict=True):
        mine = [r for r in row if r.group.name in counts]
        names = [r.inside for r in row]
        found = run.once(partial(block_costs, run, mine, names, relative, ridge, bias))
        costs |= unpacked(found, "costs")
    per_unit = {g.name: sizes.removed({g.name: 1}) for g in groups}
    return Allocation(cheapest(costs, per_unit, sizes.removed(counts)))


def block_costs(
    run: BlockRun,
    row: list[UnitReader],
    names: list[str],
    relative: bool,
    ridge: float | Literal["auto"],
    bias: bool,
) -> Outcome:
    """`removal_costs` of the groups that `row` reads; `names` are those of all readers in the
    block.
    """
    stats = {}
    for r in row:
        inputs, device = r.reader.weight.shape[1], r.reader.weight.device
        bf16 = run.feed.precision == "bf16"
        stats[r.inside] = GramStatistics(inputs, 0, device, bf16)
    for i, rows in enumerate(run.feed.rows):
        seen = forward_until(run.feed, run.module, run.block, i, run.inputs[rows], names)
        for r in row:
            weights = token_weights(seen.after[r.inside], relative)
            stats[r.inside].add(seen.x[r.inside], None, weights)
    costs = {r.group.name: removal_costs(r, stats[r.inside], ridge, bias) for r in row}
    return packed(costs=costs)


def removal_costs(
    r: UnitReader, stats: GramStatistics, ridge: float | Literal["auto"], bias: bool
) -> Tensor:
    """(U,) what removing 1, 2, .. units costs on the dense model, per token."""
    W = r.reader.weight
    tokens = prior_ridge(W.shape[1]) if ridge == "auto" else ridge
    inverse = ridge_problem(stats, W, tokens, bias).inverse()
    _, costs = greedy_removal(W, inverse, r.reader.member.index, r.group.units)
    return torch.tensor(costs).cumsum(0) / stats.tokens
