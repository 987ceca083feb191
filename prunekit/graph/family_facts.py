"""What removal has to know about a family of units beyond its slices: extents in each module that
shrink with it, norms over it, constants that enter with its size, how many must stay.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np

from prunekit.graph.solve import Family, Solution

Extents = dict[str, dict[int, Counter[int]]]
"""module path -> extent seen inside it -> how often it shrinks by so much when one unit goes (0:
stays).
"""


@dataclass(frozen=True)
class Argument:
    """A constant made outside a module that enters it as an argument: row u of `index` is what unit
    u owns along `dim` of `size`.
    """

    module: str
    key: int | str
    dim: int
    size: int
    index: np.ndarray


@dataclass(frozen=True)
class Facts:
    """What removal has to know about a family, in the skeleton's names."""

    extents: Extents
    norms: list[str]
    arguments: list[Argument]
    least: int


class FactFinder:
    """Works the facts about families out from the traced run."""

    def __init__(self, solution: Solution):
        self.solution = solution
        self._known: dict[int, Facts] = {}
        self.scopes: dict[str, set[bytes]] = defaultdict(set)
        for scope, keys in solution.labels.seen.items():
            for outer in _outer(scope):
                self.scopes[outer] |= keys
        self.axes: dict[str, list[int]] = defaultdict(list)
        for i, axis in enumerate(solution.labels.axes):
            for outer in _outer(axis.name.rpartition(".")[0]):
                self.axes[outer].append(i)

    def __call__(self, f: Family) -> Facts:
        """Everything about a family that its replicas share; worked out once."""
        if id(f) not in self._known:
            self._known[id(f)] = Facts(
                self.extents(f), self.norms(f), self.arguments(f), self.least(f)
            )
        return self._known[id(f)]

    def extents(self, f: Family) -> Extents:
        unit = np.array(sorted(f.units[0]))
        owned = {a: v.shape[1] for a, v in f.axes.items()}
        memo = {key: self._shrinks(m, unit) for key, m in self.solution.labels.matrices.items()}
        touched = {
            outer for a in f.axes for outer in _outer(self.solution.axis(a).name.rpartition(".")[0])
        }
        for scope, keys in self.solution.labels.seen.items():
            if any(by for key in keys for _, by in memo[key]):
                touched |= set(_outer(scope))
        out: Extents = {}
        for scope in touched:
            sizes: dict[int, Counter[int]] = defaultdict(Counter)
            for key in self.scopes.get(scope, ()):
                for extent, by in memo[key]:
                    sizes[extent][by] += 1
            for a in self.axes.get(scope, ()):
                sizes[self.solution.axis(a).size][owned.get(a, 0)] += 1
            out[scope] = {extent: by for extent, by in sizes.items() if any(by)}
        return out

    def _shrinks(self, m: np.ndarray, unit: np.ndarray) -> list[tuple[int, int]]:
        gone = np.isin(self.solution.cls[m], unit) & (m > 0)
        if not gone.any():
            return [(n, 0) for n in m.shape]
        out = []
        for d, n in enumerate(m.shape):
            others = tuple(j for j in range(m.ndim) if j != d)
            out.append(
                (n, int(((gone | (m == 0)).all(axis=others) & (m > 0).any(axis=others)).sum()))
            )
        return out

    def norms(self, f: Family) -> list[str]:
        """Modules that take a statistic over the units."""
        members = np.array(sorted({c for u in f.units for c in u}))
        hit = [
            scope
            for scope, labels in self.solution.labels.statistics
            if np.isin(self.solution.cls[labels], members).any()
        ]
        return list(dict.fromkeys(hit))

    def least(self, f: Family) -> int:
        """How many units a top-k over them picks: so many must stay."""
        members = np.array(sorted({c for u in f.units for c in u}))
        return max(
            (
                k
                for labels, k in self.solution.labels.least
                if np.isin(self.solution.cls[labels], members).any()
            ),
            default=1,
        )

    def arguments(self, f: Family) -> list[Argument]:
        """Constants that the units index, at the deepest module that gets them as an argument and
        owns slices of the units.
        """
        owner = {c: u for u, classes in enumerate(f.units) for c in classes}
        scopes = {
            outer for a in f.axes for outer in _outer(self.solution.axis(a).name.rpartition(".")[0])
        }
        out: dict[tuple[str, int | str, int], Argument] = {}
        for storage, dim, rank, labels, where in self.solution.labels.constants:
            units = np.array([owner.get(int(c), -1) for c in self.solution.cls[labels]])
            counts = np.bincount(units[units >= 0], minlength=f.n)
            if not counts.any() or len(set(counts)) > 1:
                continue
            index = np.argsort(units, kind="stable")[(units < 0).sum() :].reshape(f.n, -1)
            given = [
                g
                for g in self.solution.labels.arguments.get(storage, ())
                if len(g[2]) == rank and g[2][dim] == len(labels)
            ]
            inside = [
                g
                for g in given
                if (where == g[0] or where.startswith(g[0] + ".")) and g[0] in scopes
            ]
            for module, key, _ in inside:
                if not any(other[0].startswith(module + ".") for other in inside):
                    out[module, key, dim] = Argument(module, key, dim, len(labels), index)
        return list(out.values())


def _outer(scope: str) -> list[str]:
    parts = scope.split(".") if scope else []
    return [".".join(parts[:i]) for i in range(len(parts) + 1)]
