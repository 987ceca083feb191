"""The same share of every group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import nn

from prunekit.architecture.sizes import Sizes
from prunekit.checkpoint.stock_counts import alike, every_layer
from prunekit.errors import ConfigError
from prunekit.registry import Positive, Share, ratios
from prunekit.selection.elements import share as elements
from prunekit.types import Counts, Group, Run

CHANNELS = ("neurons", "hidden", "inner")
"""Kinds whose kept number `multiple` rounds; heads, experts and blocks are whole things."""


@ratios.register(paper="arXiv 2305.11627", year=2023)
def uniform(
    model: nn.Module,
    groups: list[Group],
    run: Run,
    *,
    target: Share = 0.2,
    of: Literal["units", "prunable", "model"] = "model",
    multiple: Positive = 1,
    by_kind: dict[str, Share] | None = None,
    loadable: Literal["any", "stock"] = "any",
) -> Counts:
    """Removes the share `target` of every group's units, of the prunable parameters, or of the
    whole model's parameters.

    `units` follows LLM-Pruner's floor rule on channels: kept = floor(channels * (1 - target)),
    whole heads only. `prunable` and `model` solve for the share of units that removes `target` of
    those parameters, to within one unit. `multiple` rounds kept neurons and residual channels to a
    multiple. `by_kind` gives kinds of units a share of their own, of units. No group is emptied.
    `loadable=stock` takes the same counts in every layer, the nearest ones that transformers' own
    class can build. Raises ConfigError when the target cannot be reached.
    """
    if loadable == "stock" and not all(g.kind in ("blocks", "weights") for g in groups):
        return stock_counts(model, groups, target, of, multiple, by_kind or {})
    if of == "units":
        return {
            g.name: rounded(g, units_removed(g, (by_kind or {}).get(g.kind, target)), multiple)
            for g in groups
        }
    if by_kind:
        raise ConfigError(f"ratio.by_kind={by_kind} counts units: give ratio.of=units (got {of})")
    sizes = Sizes(model, groups)
    return solve(
        groups,
        sizes,
        target * (sizes.total if of == "model" else sizes.prunable()),
        multiple,
        f"{target} of {of}",
    )


def stock_counts(
    model: nn.Module,
    groups: list[Group],
    target: float,
    of: str,
    multiple: int,
    by_kind: dict[str, float],
) -> Counts:
    """Counts for `loadable=stock`: proposed by the ordinary rules, settled by what the
    architecture's class accepts.
    """
    every_layer(model, groups)  # says what to do before anything is solved
    if of == "units":
        proposal = {g.kind: units_removed(g, by_kind.get(g.kind, target)) / g.units for g in groups}
        return alike(model, groups, proposal, lambda g, n: rounded(g, n, multiple), None)
    sizes = Sizes(model, groups)
    budget = target * (sizes.total if of == "model" else sizes.prunable())
    counts = solve(groups, sizes, budget, 1, f"{target} of {of}")
    share = {g.kind: counts[g.name] / g.units for g in groups}
    return alike(model, groups, share, lambda g, n: rounded(g, n, multiple), budget)


def units_removed(group: Group, share: float) -> int:
    """LLM-Pruner's rule: kept channels are floored, then only whole units of `width` channels go;
    one unit always stays.

    Of single weights the removed ones are floored, as in the papers that prune them.
    """
    if group.kind == "weights":
        return elements(group.units, share)
    channels = group.units * group.width
    # 1e-9 keeps an exact product such as 100 * (1 - 0.9) from falling below its integer.
    kept = int(channels * (1 - share) + 1e-9)
    return min((channels - kept) // group.width, group.units - 1)


def rounded(group: Group, removed: int, multiple: int) -> int:
    """`removed` moved so that the kept units are the nearest multiple, at least one multiple (heads
    and blocks are left as they are).
    """
    if multiple == 1 or removed == 0 or group.kind not in CHANNELS:
        return removed
    kept = max(multiple, round((group.units - removed) / multiple) * multiple)
    return max(0, group.units - min(kept, group.units))


def solve(groups: list[Group], sizes: Sizes, budget: float, multiple: int, asked: str) -> Counts:
    """Counts, proportional to each group's units, whose parameters come as near `budget` as one
    unit (or one multiple) allows.
    """

    def at(share: float) -> Counts:
        return {
            g.name: rounded(g, min(int(share * g.units), g.units - 1), multiple) for g in groups
        }

    if sizes.removed(at(1.0)) < budget:
        most = sizes.removed(at(1.0)) / sizes.total
        raise ConfigError(
            f"ratio: {asked} cannot be removed from {len(groups)} groups that hold at most "
            f"{most:.1%} of the model; "
            "lower ratio.target, exclude less, or let the pruner take more kinds of units"
        )
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sizes.removed(at(middle)) <= budget else (low, middle)
    counts = at(low)
    fill(groups, counts, low, lambda c: budget - sizes.removed(c), multiple)
    return counts


def fill(
    groups: list[Group], counts: Counts, share: float, gap: Callable[[Counts], float], multiple: int
) -> None:
    """Add single units, those nearest to their turn first, until none fits into the gap; a last one
    may cross it if that is nearer.
    """
    order = sorted(groups, key=lambda g: share * g.units - counts[g.name], reverse=True)

    def one_more(g: Group) -> Counts:
        return counts | {g.name: counts[g.name] + (multiple if g.kind in CHANNELS else 1)}

    fitted = True
    while fitted:
        fitted = False
        for g in order:
            trial = one_more(g)
            if trial[g.name] < g.units and gap(trial) >= 0:
                counts.update(trial)
                fitted = True
    last = min(
        (t for g in order if (t := one_more(g))[g.name] < g.units),
        key=lambda t: abs(gap(t)),
        default=counts,
    )
    if abs(gap(last)) < abs(gap(counts)):
        counts.update(last)
