"""What pruners of experts share: going from block to block, and what must hold before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prunekit import graph
from prunekit.activations.blockwise import BlockRun, groups_by_block
from prunekit.activations.storage import PassOptions
from prunekit.errors import ConfigError
from prunekit.graph.discovery import Discovery, discovery
from prunekit.graph.expert_neurons import (
    expert_members,
    expert_numbers,
    expert_slabs,
    neurons_inside,
)
from prunekit.problem import Expected, Problem, expect
from prunekit.solvers.expert_merging import Clusters, merge_cluster
from prunekit.types import Counts, Group, Kept, Pruned, Run

Plan = Callable[[Group, Run, int], tuple[Clusters, Tensor]]
"""(experts, their block on the text, how many stay) -> clusters, and a weight (E,) an expert."""


def check_experts_by_block(problem: Problem, **_: Any) -> Expected:
    """Raises ConfigError where the ratio cannot be met or moves experts between layers, and for
    experts outside of the blocks.
    """
    groups = problem.groups(["experts"])
    groups_by_block(groups, problem.blocks())
    expected = expect(problem, groups)
    if expected.counts is not None and problem.allocate(groups).ranking != "local":
        raise ConfigError(
            "experts are chosen one block at a time, and the ratio lets layers exchange them: give "
            "ratio.ranking=local"
        )
    return expected


def check_merging(problem: Problem, **_: Any) -> Expected:
    """Raises ConfigError where the ratio cannot be met or moves experts between layers, and for
    experts that cannot be merged: in a list, or of a router that picks groups of them first.
    """
    expected = check_experts_by_block(problem)
    for g in expected.groups:
        if g.modules or not expert_slabs(problem.model, g):
            raise ConfigError(f"{g.name}: experts in a list of modules cannot be merged")
        if expert_numbers(problem.model, g).shape[1] > 1:
            raise ConfigError(
                f"{g.name}: its router picks groups of experts first, and merging would take "
                "experts from one group into another: take criterion=experts"
            )
    return expected


def remove_by_block(
    problem: Problem,
    groups: list[Group],
    counts: Counts,
    options: PassOptions,
    choose: Callable[[Group, BlockRun, Discovery], Tensor],
) -> Kept:
    """Removes the experts that `choose` does not let stay, block after block, each on what the
    pruned ones before it put out. Returns the masks (U,) of the groups that lose some.
    """
    known = discovery(problem.model)
    kept: Kept = {}
    for row, run in problem.by_block(groups, counts, options):
        for g in [g for g in row if counts.get(g.name)]:
            kept[g.name] = choose(g, run, known)
            graph.remove(problem.model, {g.name: kept[g.name]}, known=known)
    return kept


@torch.no_grad()
def merge_by_block(problem: Problem, plan: Plan, options: PassOptions, align: bool) -> Pruned:
    """The experts of block after block merged by `plan`, each on what the merged ones before it put
    out. Raises ConfigError as `check_merging` does, and for neurons that cannot be aligned.
    """
    model = problem.model
    groups = check_merging(problem).groups
    counts = problem.allocate(groups).counts
    merged: dict[str, Clusters] = {}

    def merge(g: Group, run: BlockRun, known: Discovery) -> Tensor:
        neurons = neurons_inside(known.groups, expert_members(model, g)) if align else None
        if align and neurons is None:
            raise ConfigError(f"{g.name}: the neurons of its experts are not known")
        clusters, weight = plan(g, run, g.units - counts[g.name])
        merged[g.name] = [c for c in clusters if len(c) > 1]
        for cluster in merged[g.name]:
            merge_cluster(model, g, cluster, weight.cpu(), neurons)
        mask = torch.zeros(g.units, dtype=torch.bool)
        mask[[c[0] for c in clusters]] = True
        return mask

    kept = remove_by_block(problem, groups, counts, options, merge)
    return Pruned(model, kept, groups, notes={"counts": counts, "merged_experts": merged})
