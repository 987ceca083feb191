"""What pruners of experts share: going from block to block, and what must hold before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prunekit import graph
from prunekit.activations.blockwise import groups_by_block
from prunekit.activations.storage import PassOptions
from prunekit.errors import ConfigError
from prunekit.graph.discovery import discovery
from prunekit.graph.expert_neurons import expert_numbers, expert_slabs, neurons_inside
from prunekit.problem import Expected, Problem, expect
from prunekit.solvers.expert_merging import Clusters, merge_cluster, merged_members
from prunekit.types import Group, Kept, Pruned, Run

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


@torch.no_grad()
def merge_by_block(problem: Problem, plan: Plan, options: PassOptions, align: bool) -> Pruned:
    """The experts of block after block merged by `plan`, each on what the merged ones before it put
    out. Raises ConfigError as `check_merging` does, and for neurons that cannot be aligned.
    """
    model = problem.model
    groups = check_merging(problem).groups
    counts = problem.allocate(groups).counts
    known = discovery(model)
    kept: Kept = {}
    merged: dict[str, Clusters] = {}
    for row, run in problem.by_block(groups, counts, options):
        for g in [g for g in row if counts.get(g.name)]:
            neurons = neurons_inside(known.groups, merged_members(model, g)) if align else None
            if align and neurons is None:
                raise ConfigError(f"{g.name}: the neurons of its experts are not known")
            clusters, weight = plan(g, run, g.units - counts[g.name])
            for cluster in clusters:
                if len(cluster) > 1:
                    merge_cluster(model, g, cluster, weight.cpu(), neurons)
            mask = torch.zeros(g.units, dtype=torch.bool)
            mask[[c[0] for c in clusters]] = True
            graph.remove(model, {g.name: mask}, known=known)
            kept[g.name] = mask
            merged[g.name] = [c for c in clusters if len(c) > 1]
    return Pruned(model, kept, groups, notes={"counts": counts, "merged_experts": merged})
