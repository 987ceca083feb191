"""The same share of every group: LLM-Pruner's floor rules, or the share that removes so many
parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

from torch import nn

from prunekit.architecture.sizes import Sizes
from prunekit.checkpoint.block_configs import MULTIPLE, check_groups
from prunekit.checkpoint.stock_counts import alike, same_in_every_layer
from prunekit.errors import ConfigError
from prunekit.selection.elements import floor_share
from prunekit.types import Counts, Group, Of

CHANNELS = ("neurons", "hidden", "inner")
"""Kinds whose kept number `multiple` rounds; heads, experts and blocks are whole things."""
Loadable = Literal["any", "stock", "deci"]
Multiples = Mapping[str, int]
"""kind -> what kept units are a multiple of."""


def uniform_counts(
    model: nn.Module,
    groups: list[Group],
    target: float,
    of: Of = "model",
    *,
    multiple: int = 1,
    per_kind: Mapping[str, float] | None = None,
    loadable: Loadable = "any",
    floor: Literal["kept", "removed"] = "kept",
) -> Counts:
    """Counts by which every group loses the same share.

    Args:
        target: share removed, 0 <= target < 1.
        of: of what: the units of every group, the prunable parameters, all parameters.
        multiple: kept neurons and channels are a multiple of this.
        per_kind: shares of their own for kinds of units; only with of=units.
        loadable: `stock`: only such counts, alike in every layer, as transformers' own class can
            build; `deci`: such as DeciLM's block configs hold.
        floor: with of=units, whether kept or removed units are rounded down.

    Raises ConfigError when the target cannot be met.
    """
    if per_kind and of != "units":
        raise ConfigError(f"ratio.per_kind={per_kind} counts units: give ratio.of=units (got {of})")
    multiples = dict.fromkeys(CHANNELS, multiple)
    if loadable == "deci":
        check_groups(model, groups)
        multiples["neurons"] = math.lcm(multiple, MULTIPLE)
    check_kinds(groups, multiples, per_kind or {})
    stock = loadable == "stock" and not all(g.kind in ("blocks", "weights") for g in groups)
    if stock:
        alike(model, groups)  # says what to do before anything is solved
    if of == "units":
        wanted = {
            g.name: units_removed(g, (per_kind or {}).get(g.kind, target), floor) for g in groups
        }
        budget = None
    else:
        sizes = Sizes(model, groups)
        budget = target * (sizes.total if of == "model" else sizes.prunable())
        wanted = solve(
            groups,
            sizes,
            budget,
            {} if stock else multiples,
            what=f"{target} of {of}",
            together=("heads",) if loadable == "deci" else (),
        )
    if stock:
        share = {g.kind: wanted[g.name] / g.units for g in groups}
        return same_in_every_layer(
            model, groups, share, lambda g, n: rounded(g, n, multiples), budget
        )
    return {g.name: rounded(g, wanted[g.name], multiples) for g in groups}


def check_kinds(groups: list[Group], multiples: Multiples, per_kind: Mapping[str, float]) -> None:
    """Raises ConfigError for a share of a kind that is not pruned, and for a multiple that a group
    does not reach.
    """
    kinds = sorted({g.kind for g in groups})
    unknown = sorted(per_kind.keys() - set(kinds))
    if unknown:
        raise ConfigError(
            f"ratio.per_kind: {', '.join(unknown)} are not pruned here; possible: "
            f"{', '.join(kinds)}"
        )
    small = next((g for g in groups if g.units < multiples.get(g.kind, 1)), None)
    if small is not None:
        raise ConfigError(
            f"ratio.multiple={multiples[small.kind]}: {small.name} has {small.units} units; "
            f"possible: 1 to {small.units}"
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


def of_the_whole(groups: list[Group], counts: Counts, target: float) -> Counts:
    """`counts` of single weights with as many more as rounding each matrix down leaves to the share
    `target` of all of them: for those that are ranked together, of which only the total counts.
    """
    lacking = floor_share(sum(g.units for g in groups), target) - sum(counts.values())
    return {g.name: counts[g.name] + (i < lacking) for i, g in enumerate(groups)}


def rounded(group: Group, removed: int, multiples: Multiples) -> int:
    """`removed` moved so that the kept units are the nearest multiple, at least one multiple."""
    multiple = multiples.get(group.kind, 1)
    if multiple == 1 or removed == 0:
        return removed
    kept = max(multiple, round((group.units - removed) / multiple) * multiple)
    return max(0, group.units - min(kept, group.units))


def solve(
    groups: list[Group],
    sizes: Sizes,
    budget: float,
    multiples: Multiples,
    *,
    what: str,
    together: tuple[str, ...] = (),
) -> Counts:
    """Counts, proportional to each group's units, whose parameters come as near `budget` as one
    unit (or one multiple) allows.

    what: the budget in words.
    together: kinds of which all groups have the same count.

    Raises ConfigError where the groups hold less than the budget.
    """

    def at(share: float) -> Counts:
        return {
            g.name: rounded(g, min(int(share * g.units), g.units - 1), multiples) for g in groups
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
    steps = [[g] for g in groups if g.kind not in together]
    steps += filter(None, ([g for g in groups if g.kind == kind] for kind in together))
    fill(steps, counts, low, lambda c: budget - sizes.removed(c), multiples)
    return counts


def fill(
    steps: list[list[Group]],
    counts: Counts,
    share: float,
    gap: Callable[[Counts], float],
    multiples: Multiples,
) -> None:
    """Add single units, to the groups of a step together, those nearest to their turn first, until
    none fits into the gap; a last one may cross it if that is nearer.
    """
    units = {g.name: g.units for groups in steps for g in groups}
    order = sorted(steps, key=lambda s: share * s[0].units - counts[s[0].name], reverse=True)

    def next_count(g: Group) -> int:
        multiple = multiples.get(g.kind, 1)
        return counts[g.name] + ((g.units - counts[g.name]) % multiple or multiple)

    def one_more(groups: list[Group]) -> Counts | None:
        more = {g.name: next_count(g) for g in groups}
        return counts | more if all(n < units[name] for name, n in more.items()) else None

    fitted = True
    while fitted:
        fitted = False
        for groups in order:
            trial = one_more(groups)
            if trial is not None and gap(trial) >= 0:
                counts.update(trial)
                fitted = True
    last = min(
        (trial for groups in order if (trial := one_more(groups)) is not None),
        key=lambda trial: abs(gap(trial)),
        default=counts,
    )
    if abs(gap(last)) < abs(gap(counts)):
        counts.update(last)
