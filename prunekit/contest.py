"""Which groups a pruner may take units from: the kinds it was asked for, less what the exclusion spares."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from prunekit.registry import ConfigError
from prunekit.types import Group


def of_kinds(model: nn.Module, everything: Sequence[Group], kinds: Sequence[str]) -> list[Group]:
    """The groups of these kinds. Raises ConfigError naming the kinds that the model has."""
    missing = set(kinds) - {g.kind for g in everything}
    if missing:
        have = sorted({g.kind for g in everything})
        raise ConfigError(f"{type(model).__name__} has no units of kind {sorted(missing)}; it has {have}")
    return [g for g in everything if g.kind in kinds]


def spared(groups: list[Group], exclude: Callable[[list[Group]], list[Group]]) -> list[Group]:
    """The groups in the contest. Raises ConfigError when the exclusion leaves nothing."""
    remaining = exclude(groups)
    if not remaining:
        raise ConfigError(f"the exclusion leaves nothing of {len(groups)} groups ({groups[0].name} .. {groups[-1].name})")
    return remaining
