"""The same counts in every layer, and only such as transformers' own class can build: what
`ratio.loadable=stock` chooses.

Which sizes an architecture takes, its class decides: units are removed from a copy on the meta
device, and `stock_config` says whether the class builds a model of those shapes. There is no table
of rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from prunekit import graph
from prunekit.architecture.sizes import Sizes
from prunekit.checkpoint.construction import build_on_meta, initialise_buffers, stock_class
from prunekit.checkpoint.stock_config import stock_config
from prunekit.errors import ConfigError
from prunekit.types import Counts, Group

PerKind = dict[str, int]
"""kind -> units to remove from each of its groups."""
TRIES = 64
"""How many neighbouring counts are offered to the class before giving up."""


def same_in_every_layer(
    model: nn.Module,
    groups: list[Group],
    share: dict[str, float],
    multiple: Callable[[Group, int], int],
    budget: float | None,
) -> Counts:
    """Counts nearest to `share` of each kind's units (or to `budget` parameters) that leave a model
    stock transformers can build.

    Heads, experts and residual channels come first, in whole steps; neurons, which nearly every
    count suits, take up the rest of the budget. `multiple(group, removed)` rounds. Raises
    ConfigError when layers are excluded or nothing is accepted.
    """
    kinds = every_layer(model, groups)
    accepts = StockClass(model, {kind: [g.name for g in of] for kind, of in kinds.items()})
    chosen: PerKind = {}
    for kind in sorted(kinds, key=lambda k: k == "neurons"):
        group = kinds[kind][0]
        if kind == "neurons" and budget is not None:
            wanted = units_for(Sizes(model, groups), kinds, chosen, budget)
        else:
            wanted = round(share[kind] * group.units)
        for count in nearest(multiple(group, wanted), group.units):
            if multiple(group, count) == count and accepts(chosen | {kind: count}):
                chosen[kind] = count
                break
        else:
            raise ConfigError(
                f"ratio.loadable=stock: {type(model).__name__} accepts no number of {kind} near "
                f"{group.units - wanted} in every layer"
            )
    return {g.name: chosen[g.kind] for g in groups}


def every_layer(
    model: nn.Module, groups: list[Group], loadable: str = "stock"
) -> dict[str, list[Group]]:
    """The groups by kind. Raises ConfigError when a kind's groups differ in size or leave out a
    layer.
    """
    kinds: dict[str, list[Group]] = {}
    for g in groups:
        kinds.setdefault(g.kind, []).append(g)
    for kind, of in kinds.items():
        there = [g for g in graph.discover(model) if g.kind == kind]
        if len({g.units for g in of}) > 1 or len(of) < len(there):
            raise ConfigError(
                f"ratio.loadable={loadable} prunes {kind} in every layer by the same count: they "
                f"are in {len(there)} groups of the model, {len(of)} of them may be pruned "
                f"with {sorted({g.units for g in of})} units; use exclude=none, or loadable=any "
                "for a self-contained checkpoint"
            )
    return kinds


class StockClass:
    """Whether stock transformers builds the model that a removal leaves; each answer is kept."""

    def __init__(self, model: nn.Module, names: dict[str, list[str]]):
        self.model, self.names = model, names
        self.answers: dict[tuple[tuple[str, int], ...], bool] = {}

    def __call__(self, counts: PerKind) -> bool:
        key = tuple(sorted((k, n) for k, n in counts.items() if n))
        if key not in self.answers:
            self.answers[key] = not key or self._builds(dict(key))
        return self.answers[key]

    def _builds(self, counts: PerKind) -> bool:
        copy = build_on_meta(stock_class(self.model), self.model.config).eval()
        initialise_buffers(copy, "cpu")  # tables such as rotary frequencies are compared by value
        units = {g.name: g.units for g in graph.discover(copy)}
        kept = {
            name: torch.arange(units[name]) >= n
            for kind, n in counts.items()
            for name in self.names[kind]
        }
        return stock_config(graph.remove(copy, kept)) is not None


def units_for(sizes: Sizes, kinds: dict[str, list[Group]], chosen: PerKind, budget: float) -> int:
    """Neurons to remove from every layer so that, with what is chosen already, the removed
    parameters come nearest `budget`.
    """

    def gone(n: int) -> int:
        counts = chosen | {"neurons": n}
        return sizes.removed({g.name: counts[k] for k, of in kinds.items() for g in of})

    return min(range(kinds["neurons"][0].units), key=lambda n: abs(gone(n) - budget))


def nearest(wanted: int, units: int) -> Iterable[int]:
    """Counts around `wanted`, the closest first, none that would empty a group."""
    around = sorted(range(units), key=lambda n: (abs(n - wanted), n))
    return around[: max(TRIES, 1)] if units > 256 else around
