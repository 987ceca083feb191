"""The same share of every group: LLM-Pruner's floor rules, or the share that removes so many
parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from torch import nn

from prunekit.architecture.sizes import Sizes
from prunekit.checkpoint.stock_counts import every_layer, same_in_every_layer
from prunekit.errors import ConfigError
from prunekit.selection.elements import floor_share
from prunekit.types import Counts, Group, Of

CHANNELS = ("neurons", "hidden", "inner")
"""Kinds whose kept number `multiple` rounds; heads, experts and blocks are whole things."""


def uniform_counts(
    model: nn.Module,
    groups: list[Group],
    target: float,
    of: Of = "model",
    *,
    multiple: int = 1,
    per_kind: Mapping[str, float] | None = None,
    stock: bool = False,
    floor: Literal["kept", "removed"] = "kept",
) -> Counts:
    """Counts by which every group loses the same share.

    Args:
        target: share removed, 0 <= target < 1.
        of: of what: the units of every group, the prunable parameters, all parameters.
        multiple: kept neurons and channels are a multiple of this.
        per_kind: shares of their own for kinds of units; only with of=units.
        floor: with of=units, whether kept or removed units are rounded down.
        stock: only such counts, alike in every layer, as transformers' own class can build.

    Raises ConfigError when the target cannot be met.
    """
    if per_kind and of != "units":
        raise ConfigError(f"ratio.per_kind={per_kind} counts units: give ratio.of=units (got {of})")
    check_kinds(groups, multiple, per_kind or {})
    stock = stock and not all(g.kind in ("blocks", "weights") for g in groups)
    if stock:
        every_layer(model, groups)  # says what to do before anything is solved
    if of == "units":
        wanted = {
            g.name: units_removed(g, (per_kind or {}).get(g.kind, target), floor) for g in groups
        }
        budget = None
    else:
        sizes = Sizes(model, groups)
        budget = target * (sizes.total if of == "model" else sizes.prunable())
        wanted = solve(groups, sizes, budget, 1 if stock else multiple, f"{target} of {of}")
    if stock:
        share = {g.kind: wanted[g.name] / g.units for g in groups}
        return same_in_every_layer(
            model, groups, share, lambda g, n: rounded(g, n, multiple), budget
        )
    return {g.name: rounded(g, wanted[g.name], multiple) for g in groups}


def check_kinds(groups: list[Group], multiple: int, per_kind: Mapping[str, float]) -> None:
    """Raises ConfigError for a share of a kind that is not pruned, and for a multiple that no group
    reaches.
    """
    kinds = sorted({g.kind for g in groups})
    unknown = sorted(per_kind.keys() - set(kinds))
    if unknown:
        raise ConfigError(
            f"ratio.per_kind: {', '.join(unknown)} are not pruned here; possible: "
            f"{', '.join(kinds)}"
        )
    small = next((g for g in groups if g.kind in CHANNELS and g.units < multiple), None)
    if small is not None:
        raise ConfigError(
            f"ratio.multiple={multiple}: {small.name} has {small.units} units; possible: 1 to "
            f"{small.units}"
        )


def units_removed(group: Group, share: float, floor: Literal["kept", "removed"] = "kept") -> int:
    """LLM-Pruner's rule: kept channels are floored, then only whole units of `width` channels go;
    one unit always stays. `removed` floors the units that go (FLAP).

    Of single weights the removed ones are floored, as in the papers that prune them.
    """
    if group.kind == "weights":
        return floor_share(group.units, share)
    if floor == "removed":
        return min(floor_share(group.units, share), group.units - 1)
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


def solve(groups: list[Group], sizes: Sizes, budget: float, multiple: int, what: str) -> Counts:
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
            f"ratio: {what} cannot be removed from {len(groups)} groups that hold at most "
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
