"""Recipes to try for a cut: which sizes kept in Python follow it, simplest first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

from torch import nn

from prunekit.graph.groups import Cut
from prunekit.graph.module_sizes import Recipe, Setting, dependent_sizes


def sizes_in(model: nn.Module, cuts: Sequence[Cut]) -> dict[Setting, bool]:
    """Attributes of module classes that may have to follow -> whether that is doubtful."""
    sizes: dict[Setting, bool] = {}
    for cut in cuts:
        for setting, change in dependent_sizes(cut.candidate, 1, model).items():
            of_class = setting._replace(owner=change.cls)
            sizes[of_class] = sizes.get(of_class, False) or change.doubtful
    return sizes


def recipes(model: nn.Module, cuts: Sequence[Cut]) -> Iterator[Recipe]:
    """Which sizes follow: first all that are certain, then none, then with configs, then the
    doubtful, then up to three exceptions.
    """
    sizes = sizes_in(model, cuts)
    modules = frozenset(k for k in sizes if not k.in_config)
    certain = frozenset(k for k, doubtful in sizes.items() if not doubtful)
    none: frozenset[Setting] = frozenset()
    bases = list(dict.fromkeys([modules & certain, none, certain, modules, frozenset(sizes)]))
    for base in bases:
        yield Recipe(base, config=False)
    order = sorted(sizes, key=lambda k: k.in_config)
    for size in (1, 2, 3):
        for exceptions in combinations(order, size):
            for base in bases[:3]:
                yield Recipe(base ^ frozenset(exceptions), config=False)
