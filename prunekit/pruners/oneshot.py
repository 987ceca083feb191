"""Score the dense model, choose, apply; `steps` > 1 repeats it on what is left (LLM-Pruner's schedule)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn

from prunekit import graph, select
from prunekit.calib import WholeRun
from prunekit.registry import ConfigError, Positive, pruners
from prunekit.sizes import Sizes
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
    ranking: Literal["local", "global"] = "local",
    budget: Literal["units", "prunable", "model"] = "model",
    steps: Positive = 1,
    norm: Literal["plain", "rescale"] = "plain",
    compress: bool = True,
    verify: bool = True,
) -> Pruned:
    """Scores every unit of `kinds` on the model as it is, removes the lowest, in one step or in several.

    `kinds` heads + neurons is the paper's Block strategy, hidden its Channel strategy, blocks drops whole layers. `grouping=none` lets every
    matrix choose its own units (the paper's Table 6: no dependency). `ranking=global` pools all groups; `budget` says in what the
    pool is counted (follows ratio.of). `norm=rescale` corrects RMSNorm for removed residual channels. `compress=false` zeroes
    instead of removing. `verify` proves on a small twin that removing equals zeroing. Raises ConfigError when nothing is left to prune.
    """
    kept: Kept = {}
    first: Scores = {}
    groups = chosen(model, kinds, exclude, grouping, verify)
    counts = ratio(model, groups, WholeRun(model, tokens))
    for step in range(1, steps + 1):
        now = groups if step == 1 else chosen(model, kinds, exclude, grouping, verify=False)
        scores = criterion(model, now, WholeRun(model, tokens))
        gone = {g.name: int((~kept[g.name]).sum()) if g.name in kept else 0 for g in now}
        todo = {name: counts[name] * step // steps - gone[name] for name in gone}
        mask = choose(model, now, scores, todo, ranking, budget)
        (graph.remove if compress else graph.zero)(model, mask, **({"norm": norm} if compress else {}))
        kept = {n: select.within(kept[n], m) if n in kept and compress else m & kept.get(n, m) for n, m in mask.items()}
        first = first or scores
    return Pruned(model, kept, groups, first, {"counts": counts})


def chosen(model: nn.Module, kinds: list[Any], exclude: Callable[[list[Group]], list[Group]], grouping: str, verify: bool) -> list[Group]:
    """The groups in the contest. Raises ConfigError naming the kinds there are, or that the exclusion leaves nothing."""
    found = graph.discover(model, verify=verify)
    groups = [g for g in found if g.kind in kinds]
    missing = set(kinds) - {g.kind for g in found}
    if missing:
        raise ConfigError(f"{type(model).__name__} has no units of kind {sorted(missing)}; it has {sorted({g.kind for g in found})}")
    left = exclude(groups)
    if not left:
        raise ConfigError(f"the exclusion leaves nothing of {len(groups)} groups ({groups[0].name} .. {groups[-1].name})")
    return split(left) if grouping == "none" else left


def split(groups: list[Group]) -> list[Group]:
    """Every member a group of its own: structures are chosen without regard to what depends on them (the paper's Table 6)."""
    return [dataclasses.replace(g, name=f"{g.name}/{m.param}:{m.axis}", members=(m,)) for g in groups for m in g.members]


def choose(model: nn.Module, groups: list[Group], scores: Scores, counts: Counts, ranking: str, budget: str) -> Kept:
    """Local: so many of each group. Global: the same total, in units or in parameters, wherever the scores are lowest."""
    if ranking == "local":
        return select.local(scores, counts)
    if budget == "units":
        total = sum(counts.values())
        return select.pooled(scores, lambda c: sum(c.values()) <= total)
    sizes = Sizes(model, groups)
    total = sizes.removed(counts)
    return select.pooled(scores, lambda c: sizes.removed(c) <= total)
