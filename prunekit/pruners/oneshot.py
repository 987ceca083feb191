"""Score the dense model, choose, apply; `steps` > 1 repeats it on what is left (LLM-Pruner's
schedule).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from prunekit import graph
from prunekit.activations.runs import WholeRun
from prunekit.architecture.sizes import Sizes
from prunekit.registry import Natural, Positive, pruners
from prunekit.selection import units as select
from prunekit.selection.eligible import of_kinds, spared
from prunekit.solvers.bias_compensation import add_biases, lost_means
from prunekit.types import Counts, Group, Kept, Pruned, Scores

Kind = Literal["neurons", "heads", "hidden", "experts", "inner", "blocks"]


@pruners.register(paper="arXiv 2305.11627", year=2023, out="self-contained", kinds="option")
def oneshot(
    model: nn.Module,
    tokens: Tensor,
    criterion: Callable[..., Scores],
    ratio: Callable[..., Counts],
    exclude: Callable[[list[Group]], list[Group]],
    *,
    kinds: list[Kind] = ["heads", "neurons"],  # noqa: B006 (never mutated; the YAML states the same)
    grouping: Literal["coupled", "none"] = "coupled",
    ranking: Literal["local", "kind", "global"] = "local",
    budget: Literal["units", "prunable", "model"] = "model",
    steps: Positive | Literal["each"] = 1,
    compensate: Literal["none", "bias"] = "none",
    skip: Natural = 0,
    norm: Literal["plain", "rescale"] = "plain",
    compress: bool = True,
    verify: bool = True,
) -> Pruned:
    """Scores every unit of `kinds` on the model as it is, removes the lowest, in one step or in
    several.

    `kinds` heads + neurons is the paper's Block strategy, hidden its Channel strategy, blocks drops
    whole layers. `grouping=none` lets every matrix choose its own units (the paper's Table 6: no
    dependency). `ranking=global` pools all groups, `kind` those of one kind; `budget` says in what
    the pool is counted (follows ratio.of). `steps=each` takes one unit of a group at a time.
    `compensate=bias` leaves the mean output of what goes as a bias (FLAP), over all but the first
    `skip` tokens of a sample. `norm=rescale` corrects RMSNorm for removed residual channels.
    `compress=false` zeroes instead of removing. `verify` proves on a small twin that removing
    equals zeroing. Raises ConfigError when nothing is left to prune.
    """
    kept: Kept = {}
    first: Scores = {}
    whole = now = of_kinds(model, graph.discover(model, verify=verify), kinds)
    dense = groups = spared(now, exclude)
    counts = ratio(model, groups, WholeRun(model, tokens))
    total = max(1, *counts.values()) if steps == "each" else steps
    for step in range(1, total + 1):
        if step > 1 and compress:
            now = of_kinds(model, graph.discover(model, verify=False), kinds)
            groups = [
                select.survivors(g, whole, dense, kept) if g.modules else g
                for g in spared(now, exclude)
            ]
        goals = {
            g.name: counts[g.name] * step // total
            - ((dense_units(dense, g) - g.units) if compress else 0)
            for g in groups
        }
        contest, goals = split(groups, goals) if grouping == "none" else (groups, goals)
        run = WholeRun(model, tokens, goals)
        scores = criterion(model, contest, run)
        mask = select.widened(choose(model, contest, scores, goals, ranking, budget), contest, now)
        lost = lost_means(model, contest, mask, run, skip) if compensate == "bias" else {}
        if compress:
            graph.remove(model, mask, norm=norm)
            kept = {n: select.within(kept[n], m) if n in kept else m for n, m in mask.items()}
        else:
            graph.zero(model, mask)
            kept = mask
        add_biases(model, lost)
        first = first or scores
    took_part = [g for g in whole if g.name in counts]
    return Pruned(
        model,
        kept,
        split(took_part, counts)[0] if grouping == "none" else took_part,
        first,
        {"counts": counts},
    )


def dense_units(dense: list[Group], group: Group) -> int:
    """How many units `group` had at the start."""
    return next(g.units for g in dense if g.name == group.name)


def split(groups: list[Group], counts: Counts) -> tuple[list[Group], Counts]:
    """Every member a group of its own with its group's count: structures chosen without regard to
    what depends on them (Table 6).
    """
    parts = [
        (g, dataclasses.replace(g, name=f"{g.name}/{m.param}:{m.axis}", members=(m,)))
        for g in groups
        for m in g.members
    ]
    return [part for _, part in parts], {part.name: counts[g.name] for g, part in parts}


def choose(
    model: nn.Module, groups: list[Group], scores: Scores, counts: Counts, ranking: str, budget: str
) -> Kept:
    """Local: so many of each group. Global, kind: the same total, in units or in parameters,
    wherever the scores are lowest.
    """
    if ranking == "local":
        return select.local(scores, counts)
    if ranking == "kind":
        out: Kept = {}
        for kind in dict.fromkeys(g.kind for g in groups):
            part = [g for g in groups if g.kind == kind]
            of = {g.name: counts[g.name] for g in part}
            out |= choose(model, part, {n: scores[n] for n in of}, of, "global", budget)
        return out
    if budget == "units":
        total = sum(counts.values())
        return select.pooled(scores, lambda c: sum(c.values()) <= total)
    sizes = Sizes(model, groups)
    total = sizes.removed(counts)
    return select.pooled(scores, lambda c: sizes.removed(c) <= total)
