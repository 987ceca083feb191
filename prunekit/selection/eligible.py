"""Which groups a pruner may take units from: the kinds it was asked for, less what the exclusion
spares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from prunekit import graph
from prunekit.architecture.matrices import matrices
from prunekit.errors import ConfigError
from prunekit.types import Group


def entered(
    model: nn.Module,
    kinds: Sequence[str],
    exclude: Callable[[list[Group]], list[Group]],
    targets: list[str] | None = None,
) -> list[Group]:
    """The groups that a run would prune, found without a proof; `targets` narrows matrices of
    single weights. Raises ConfigError.
    """
    if set(kinds) == {"weights"}:
        return spared(matrices(model, targets), exclude)
    return spared(of_kinds(model, graph.discover(model, verify=False), kinds), exclude)


def of_kinds(model: nn.Module, everything: Sequence[Group], kinds: Sequence[str]) -> list[Group]:
    """The groups of these kinds. Raises ConfigError naming the kinds that the model has."""
    missing = set(kinds) - {g.kind for g in everything}
    if missing:
        have = sorted({g.kind for g in everything})
        raise ConfigError(
            f"{type(model).__name__} has no units of kind {sorted(missing)}; it has {have}"
        )
    return [g for g in everything if g.kind in kinds]


def spared(groups: list[Group], exclude: Callable[[list[Group]], list[Group]]) -> list[Group]:
    """The groups in the contest. Raises ConfigError when the exclusion leaves nothing."""
    remaining = exclude(groups)
    if not remaining:
        raise ConfigError(
            f"the exclusion leaves nothing of {len(groups)} groups ({groups[0].name} .. "
            f"{groups[-1].name})"
        )
    return remaining
