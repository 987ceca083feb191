"""Scores and an allocation to kept units; nothing here changes a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from prunekit.architecture.sizes import Sizes
from prunekit.errors import ConfigError
from prunekit.graph.discovery import discovery
from prunekit.selection.elements import drop_lowest
from prunekit.types import Allocation, Counts, Group, Kept, Scores


def choose(model: nn.Module, groups: list[Group], scores: Scores, allocation: Allocation) -> Kept:
    """The units that stay: of each group as many as `allocation` leaves, or, where it ranks groups
    together, the same total wherever scores are highest.
    """
    counts = allocation.counts
    if allocation.ranking == "local":
        return keep_local(scores, counts)
    if allocation.ranking == "kind":
        kept: Kept = {}
        for kind in dict.fromkeys(g.kind for g in groups):
            same_kind = [g for g in groups if g.kind == kind]
            part = Allocation(
                {g.name: counts[g.name] for g in same_kind}, "global", allocation.budget
            )
            kept |= choose(model, same_kind, {g.name: scores[g.name] for g in same_kind}, part)
        return kept
    least = must_stay(model, groups)
    if allocation.cut == "nearest":
        sizes_of_units, share = whole_sizes(model, groups, allocation)
        return keep_nearest(scores, sizes_of_units, share, least)
    if allocation.budget == "units":
        total = sum(counts.values())
        return keep_pooled(scores, lambda c: sum(c.values()) <= total, least)
    sizes = Sizes(model, groups)
    parameters = sizes.removed(counts)
    return keep_pooled(scores, lambda c: sizes.removed(c) <= parameters, least)


def must_stay(model: nn.Module, groups: list[Group]) -> Counts:
    """How many units of a group must stay, where that is more than one: the experts that a router
    picks for a token.
    """
    if not any(g.kind == "experts" for g in groups):
        return {}
    least = discovery(model).least
    return {g.name: least.get(g.whole or g.name, 1) for g in groups}


def keep_local(scores: Scores, counts: Counts) -> Kept:
    """Remove the `counts[name]` lowest units of each group, never all of them."""
    check_finite(scores)
    return {name: without(s, min(counts.get(name, 0), s.numel() - 1)) for name, s in scores.items()}


def without(scores: Tensor, n: int) -> Tensor:
    """Mask on the CPU with the `n` lowest of all `scores` False."""
    return drop_lowest(scores.reshape(1, -1).float().cpu(), n).view(scores.shape)


def without_the_best(scores: Scores, least: Counts | None) -> list[Tensor]:
    """Copies on the CPU, flat, in which the best `least[name]` (one where it is not told) of every
    group are infinite: those are not in play, so that no module is emptied.
    """
    flat = [s.flatten().float().cpu().clone() for s in scores.values()]
    for name, s in zip(scores, flat, strict=True):
        s[s.argsort(descending=True, stable=True)[: (least or {}).get(name, 1)]] = torch.inf
    return flat


def keep_pooled(
    scores: Scores, fits: Callable[[Counts], bool], least: Counts | None = None
) -> Kept:
    """Rank the units of all groups together and remove the longest prefix of the ranking for which
    `fits(counts)` holds.

    Each unit counts as one, whatever its kind, with no normalisation (LLM-Pruner's global pruning).
    The best `least` units of every group stay. `fits` must be monotone: false stays false as counts
    grow.
    """
    check_finite(scores)
    names = list(scores)
    flat = without_the_best(scores, least)
    group = torch.cat([torch.full((s.numel(),), i) for i, s in enumerate(flat)])
    position = torch.cat([torch.arange(s.numel()) for s in flat])
    values = torch.cat(flat)
    order = torch.argsort(values, stable=True)[: int(torch.isfinite(values).sum())]

    def counts_of(k: int) -> Counts:
        return dict(zip(names, torch.bincount(group[order[:k]], minlength=len(names)).tolist()))

    low, high = 0, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(counts_of(middle)) else (low, middle - 1)
    kept = {name: torch.ones(scores[name].numel(), dtype=torch.bool) for name in names}
    for k in order[:low].tolist():
        kept[names[int(group[k])]][int(position[k])] = False
    return {name: mask.view(scores[name].shape) for name, mask in kept.items()}


def whole_sizes(
    model: nn.Module, groups: list[Group], allocation: Allocation
) -> tuple[dict[str, int], float]:
    """What a unit of each group counts, and the share of the total that goes.

    Of parameters, a unit counts as many of the smallest units as it holds, rounded down: a head of
    LLaMA is 170 neurons.
    """
    counts = allocation.counts
    if allocation.budget == "units":
        return dict.fromkeys(counts, 1), sum(counts.values()) / sum(g.units for g in groups)
    sizes = Sizes(model, groups)
    unit = {g.name: sizes.removed({g.name: 1}) for g in groups}
    least = min(unit.values())
    whole = {name: size // least for name, size in unit.items()}
    return whole, sizes.removed(counts) / sizes.prunable()


def keep_nearest(
    scores: Scores, sizes: Mapping[str, int], share: float, least: Counts | None = None
) -> Kept:
    """FLAP's cut: from the best unit down sizes add up, and where the sum comes nearest to what is
    to stay, that unit and all below it go. The best `least` units of every group stay.
    """
    check_finite(scores)
    flat = dict(zip(scores, without_the_best(scores, least), strict=True))
    values = torch.cat(list(flat.values()))
    weights = torch.cat([torch.full((s.numel(),), sizes[n]) for n, s in flat.items()])
    order = torch.argsort(values, descending=True, stable=True)
    sums = weights[order].cumsum(0)
    at = int((sums - float(sums[-1]) * (1 - share)).abs().argmin())
    free = int(torch.isinf(values).sum())  # first in the order
    mask = torch.zeros(len(values), dtype=torch.bool)
    mask[order[: max(at, free) if share > 0 else None]] = True
    parts = mask.split([s.numel() for s in flat.values()])
    return {n: part.view(scores[n].shape) for n, part in zip(flat, parts, strict=True)}


def check_finite(scores: Scores) -> None:
    """Raises ConfigError naming the group whose scores are not finite: a choice among NaNs would be
    noise.
    """
    by_device: dict[torch.device, list[Tensor]] = {}
    for s in scores.values():
        by_device.setdefault(s.device, []).append(s.isfinite().all())
    if all(bool(torch.stack(flags).all()) for flags in by_device.values()):  # one wait a device
        return
    name, bad = next((n, s) for n, s in scores.items() if not bool(s.isfinite().all()))
    count = int((~bad.isfinite()).sum())
    raise ConfigError(
        f"{count} of {bad.numel()} scores of {name} are not finite: try model.dtype=float32 "
        "or other calibration text"
    )


def restrict(outer: Tensor, inner: Tensor) -> Tensor:
    """The mask over all units when `inner` chooses among those that `outer` kept."""
    total = outer.clone()
    total[outer] = inner
    return total


def expand_to_all_blocks(kept: Kept, groups: list[Group], whole: list[Group]) -> Kept:
    """The same choice over all blocks of `whole`, where an exclusion let only those of `groups`
    compete; other kinds as they are.
    """
    full = {g.name: g for g in whole}
    out = dict(kept)
    for g in groups:
        if g.modules and g.units < full[g.name].units:
            out[g.name] = torch.ones(full[g.name].units, dtype=torch.bool)
            out[g.name][[full[g.name].modules.index(m) for m in g.modules]] = kept[g.name]
    return out


def remaining_blocks(now: Group, whole: list[Group], eligible: list[Group], kept: Kept) -> Group:
    """The blocks that may still go: those eligible at first that are left, under the names which
    they have now.
    """
    full, first = (next(g for g in groups if g.name == now.name) for groups in (whole, eligible))
    free = torch.tensor([m in first.modules for m in full.modules])[kept[now.name]]
    parent = full.modules[0].rpartition(".")[0]
    modules = tuple(f"{parent}.{i}" for i in free.nonzero()[:, 0].tolist())
    return dataclasses.replace(now, units=len(modules), modules=modules, shape=(len(modules),))
