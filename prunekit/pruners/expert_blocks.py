"""What pruners of experts share: going from block to block, and what must hold before."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from prunekit import graph
from prunekit.activations.blockwise import BlockRun, groups_by_block
from prunekit.activations.done_blocks import Outcome, packed, unpacked
from prunekit.activations.storage import PassOptions
from prunekit.errors import ConfigError
from prunekit.graph.discovery import Discovery, discovery
from prunekit.graph.expert_bodies import check_alike, expert_bodies
from prunekit.graph.expert_neurons import expert_numbers
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
    experts that cannot be merged: of other shapes in one list, or of a router that picks groups of
    them first.
    """
    expected = check_experts_by_block(problem)
    for g in expected.groups:
        check_alike(problem.model, g)
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
    choose: Callable[[Group, BlockRun, Discovery], Outcome],
    apply: Callable[[Group, Outcome], None],
) -> Kept:
    """Removes the experts that `choose` does not let stay (`stays`, a mask), once `apply` has done
    with a group what else `choose` found; block after block, each on what the pruned ones before it
    put out. Cut off, it goes on with the block at which it was. Returns the masks (U,) of the
    groups that lose some.
    """
    known = discovery(problem.model)
    kept: Kept = {}

    def chosen(part: list[Group], run: BlockRun) -> Outcome:
        return packed(**{g.name: choose(g, run, known) for g in part})

    for row, run in problem.by_block(groups, counts, options, resumable=True):
        part = [g for g in row if counts.get(g.name)]
        outcome = run.once(partial(chosen, part, run))
        for g in part:
            found = unpacked(outcome, g.name)
            apply(g, found)
            kept[g.name] = found["stays"]
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
    everything = discovery(model).groups
    losing = [g for g in groups if counts.get(g.name)]
    bodies = {g.name: expert_bodies(model, g, everything) for g in losing}
    for g in losing:
        if align and any(body.neurons is None for body in bodies[g.name]):
            raise ConfigError(f"{g.name}: the neurons of its experts are not known")

    def choose(g: Group, run: BlockRun, known: Discovery) -> Outcome:
        clusters, weight = plan(g, run, g.units - counts[g.name])
        stays = torch.zeros(g.units, dtype=torch.bool)
        stays[[c[0] for c in clusters]] = True
        members, sizes = [e for c in clusters for e in c], [len(c) for c in clusters]
        return {
            "stays": stays,
            "members": torch.tensor(members),
            "sizes": torch.tensor(sizes),
            "weight": weight.cpu(),
        }

    def merge(g: Group, found: Outcome) -> None:
        clusters = [c.tolist() for c in found["members"].split(found["sizes"].tolist())]
        merged[g.name] = [c for c in clusters if len(c) > 1]
        for cluster in merged[g.name]:
            merge_cluster(model, bodies[g.name], cluster, found["weight"], align)

    kept = remove_by_block(problem, groups, counts, options, choose, merge)
    return Pruned(model, kept, groups, notes={"counts": counts, "merged_experts": merged})
