"""The same counts in every layer, and only such as transformers' own class can build: what
`ratio.loadable=stock` chooses.

Which sizes an architecture takes, its class decides: units are removed from a copy on the meta
device, and `stock_config` says whether the class builds a model of those shapes. There is no table
of rules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import torch
from torch import nn

from prunekit import graph
from prunekit.architecture.sizes import Sizes
from prunekit.checkpoint.construction import build_on_meta, initialise_buffers, stock_class
from prunekit.checkpoint.stock_config import stock_config
from prunekit.errors import ConfigError
from prunekit.types import Counts, Group

PerPlace = dict[str, int]
"""place -> units to remove from each of its groups."""
TRIES = 64
"""How many neighbouring counts of a large group are offered to the class before giving up."""
FAR = 1 / 8
"""The share of its neurons by which a group may lose more or fewer than were asked for."""


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
    count suits, take up the rest of the budget. Groups of one kind at other places of a layer
    (experts, shared experts, dense blocks) lose the same share. `multiple(group, removed)` rounds.
    Raises ConfigError when layers are excluded or nothing is accepted.
    """
    places = alike(model, groups)
    accepts = StockClass(model, {place: [g.name for g in of] for place, of in places.items()})
    chosen: PerPlace = {}
    for kind in sorted({g.kind for g in groups}, key=lambda k: k == "neurons"):
        mine = {place: of[0] for place, of in places.items() if of[0].kind == kind}
        first = min(mine.values(), key=lambda g: g.units)
        if kind == "neurons" and budget is not None:
            wanted = units_for(Sizes(model, groups), places, chosen, mine, budget)
        else:
            wanted = round(share[kind] * first.units)
        asked = multiple(first, wanted)
        for count in nearest(asked, first.units):
            if kind == "neurons" and abs(count - asked) > FAR * first.units:
                raise ConfigError(refusal(model, mine, first, wanted, accepts))
            tried = together(mine, first, count)
            whole = all(multiple(g, tried[place]) == tried[place] for place, g in mine.items())
            if whole and accepts(chosen | tried):
                chosen |= tried
                break
        else:
            raise ConfigError(
                f"ratio.loadable=stock: {type(model).__name__} accepts no number of {kind} near "
                f"{first.units - wanted} in every layer"
            )
        if kind == "neurons" and wanted and not any(chosen.values()):
            raise ConfigError(refusal(model, mine, first, wanted, accepts))
    return {g.name: chosen[place] for place, of in places.items() for g in of}


def together(mine: dict[str, Group], first: Group, count: int) -> PerPlace:
    """The share of `count` units of `first` at every place."""
    return {place: round(count * g.units / first.units) for place, g in mine.items()}


def refusal(
    model: nn.Module, mine: dict[str, Group], first: Group, wanted: int, accepts: StockClass
) -> str:
    """What is possible where the class builds no model with about `wanted` neurons less."""
    counts = [n for n in nearest(wanted, first.units) if n and multiples(first.units - n, first)]
    near = next((n for n in counts if accepts(together(mine, first, n))), None)
    everything = by_place(g for g in graph.discover(model) if g.kind == first.kind)
    more = {place: of[0] for place, of in everything.items() if place not in mine}
    names = {place: [g.name for g in of] for place, of in everything.items()}
    possible = [] if near is None else [f"a ratio that removes {near} of {first.units}"]
    builds = StockClass(model, names)
    for also in [*({place: g} for place, g in more.items()), more]:
        if also and builds(together(mine | also, first, wanted)):
            possible.append(f"the same share of {', '.join(also)} (pruner.shared, pruner.kinds)")
            break
    return (
        f"ratio.loadable=stock: {type(model).__name__} cannot be built with {wanted} of "
        f"{first.units} neurons less of {', '.join(mine)}; possible: "
        f"{', or '.join([*possible, 'loadable=any for a self-contained checkpoint'])}"
    )


def multiples(kept: int, group: Group) -> bool:
    """Whether a few times the units of a group, such as shared experts have, are so many times what
    is kept.
    """
    return any(group.units * times % kept == 0 for times in range(1, 5))


def by_place(groups: Iterable[Group]) -> dict[str, list[Group]]:
    """The groups by kind and by where in a layer they are."""
    found: dict[str, list[Group]] = {}
    for g in groups:
        name = re.sub(r"\.\d+\b", "", g.members[0].param) if g.members else ""
        found.setdefault(f"{g.kind} ({name})", []).append(g)
    return found


def alike(model: nn.Module, groups: list[Group]) -> dict[str, list[Group]]:
    """The groups by place. Raises ConfigError where those of one place differ in size or leave out
    a layer.
    """
    places, everywhere = by_place(groups), by_place(graph.discover(model))
    for place, of in places.items():
        _check_complete(of, everywhere[place], of[0].kind, "stock")
    return places


def every_layer(model: nn.Module, groups: list[Group], loadable: str) -> None:
    """Raises ConfigError when a kind's groups differ in size or leave out a layer."""
    everything = graph.discover(model)
    for kind in dict.fromkeys(g.kind for g in groups):
        there = [g for g in everything if g.kind == kind]
        _check_complete([g for g in groups if g.kind == kind], there, kind, loadable)


def _check_complete(of: list[Group], there: list[Group], kind: str, loadable: str) -> None:
    if len({g.units for g in of}) > 1 or len(of) < len(there):
        raise ConfigError(
            f"ratio.loadable={loadable} prunes {kind} in every layer by the same count: they "
            f"are in {len(there)} groups of the model, {len(of)} of them may be pruned "
            f"with {sorted({g.units for g in of})} units; use exclude=none, or loadable=any "
            "for a self-contained checkpoint"
        )


class StockClass:
    """Whether stock transformers builds the model that a removal leaves; each answer is kept."""

    def __init__(self, model: nn.Module, names: dict[str, list[str]]):
        self.model, self.names = model, names
        self.answers: dict[tuple[tuple[str, int], ...], bool] = {}

    def __call__(self, counts: PerPlace) -> bool:
        key = tuple(sorted((k, n) for k, n in counts.items() if n))
        if key not in self.answers:
            self.answers[key] = not key or self._builds(dict(key))
        return self.answers[key]

    def _builds(self, counts: PerPlace) -> bool:
        copy = build_on_meta(stock_class(self.model), self.model.config).eval()
        initialise_buffers(copy, "cpu")  # tables such as rotary frequencies are compared by value
        units = {g.name: g.units for g in graph.discover(copy)}
        kept = {
            name: torch.arange(units[name]) >= n
            for kind, n in counts.items()
            for name in self.names[kind]
        }
        return stock_config(graph.remove(copy, kept)) is not None


def units_for(
    sizes: Sizes,
    places: dict[str, list[Group]],
    chosen: PerPlace,
    mine: dict[str, Group],
    budget: float,
) -> int:
    """Neurons to remove from the groups of the smallest of the places `mine`, and the same share at
    the others, so that, with what is chosen already, the removed parameters come nearest `budget`.
    """
    first = min(mine.values(), key=lambda g: g.units)

    def gone(n: int) -> int:
        counts = chosen | together(mine, first, n)
        return sizes.removed({g.name: counts[p] for p, of in places.items() for g in of})

    return min(range(first.units), key=lambda n: abs(gone(n) - budget))


def nearest(wanted: int, units: int) -> Iterable[int]:
    """Counts around `wanted`, the closest first, none that would empty a group."""
    around = sorted(range(units), key=lambda n: (abs(n - wanted), n))
    return around[:TRIES] if units > 256 else around
