"""Which groups a pruner may take units from: the kinds it was asked for, less what is excluded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from prunekit.errors import ConfigError
from prunekit.types import Group


def of_kinds(model: nn.Module, groups: Sequence[Group], kinds: Sequence[str]) -> list[Group]:
    """The groups of these kinds. Raises ConfigError naming the kinds that the model has."""
    missing = set(kinds) - {g.kind for g in groups}
    if missing:
        have = sorted({g.kind for g in groups})
        raise ConfigError(
            f"{type(model).__name__} has no units of kind {sorted(missing)}; it has {have}"
        )
    return [g for g in groups if g.kind in kinds]


def apply_exclusion(
    groups: list[Group],
    exclude: Callable[[list[Group]], list[Group]],
    others: Sequence[Group] = (),
) -> list[Group]:
    """What the exclusion leaves of `groups`. It is shown the model's `others` too: the last block
    is the model's, also where that one has none of `groups`. Raises ConfigError where nothing is
    left.
    """
    names = {g.name for g in groups}
    everything = [*groups, *(g for g in others if g.name not in names)]
    remaining = [g for g in exclude(everything) if g.name in names]
    if not remaining:
        raise ConfigError(
            f"the exclusion leaves nothing of {len(groups)} groups "
            f"({groups[0].name} .. {groups[-1].name}): give exclude=none, or leave fewer blocks "
            "alone (exclude=ends: exclude.first, exclude.last; exclude=range: its ranges)"
        )
    return remaining
