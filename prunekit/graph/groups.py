"""Typed families of a skeleton -> the real model's groups, and the module extents that shrink with
each of them.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn

from prunekit.graph.skeleton import block_lists, block_of, numbers
from prunekit.graph.solve import Family, Solution
from prunekit.graph.unit_kinds import Typed
from prunekit.types import Group, Member

Extents = dict[str, dict[int, Counter[int]]]
"""module path -> extent seen inside it -> how often it shrinks by so much when one unit goes (0:
stays).
"""
Pattern = tuple[str, frozenset[tuple[str, int]]]
"""What groups that are built alike share: kind, and tensors with the numbers taken out of their
names.
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


@dataclass
class Candidate:
    """A group together with what removal has to know; `numbers`: attributes that are not sizes;
    `spare`: other families for its place.
    """

    group: Group
    pattern: Pattern
    extents: Extents
    norms: list[str]
    arguments: list[Argument]
    least: int = 1
    block: str | None = None
    numbers: frozenset[tuple[str, str]] = frozenset()
    spare: list[Candidate] = field(default_factory=list)


def pattern_of(kind: str, members: Iterable[tuple[str, int]]) -> Pattern:
    return kind, frozenset((re.sub(r"\d+", "#", name), dim) for name, dim in members)


def candidates(
    solution: Solution,
    typed: list[Typed],
    small: nn.Module,
    stands: dict[str, list[int]],
    real: nn.Module,
) -> list[Candidate]:
    """Groups of the real model, in the order of its blocks: each real block takes those of the
    block that stands for it.
    """
    lists = block_lists(real)
    places = [(path, i) for path, n in lists.items() for i in range(n)]
    clash = Counter(i for _, i in places)
    shown = {
        place: (place[1] if clash[place[1]] == 1 or len(lists) == 1 else k)
        for k, place in enumerate(places)
    }
    used = {t.block[0] for t in typed if t.block}
    if len(used) == 1:
        shown = {place: place[1] for place in places}
    sizes = {id(t): _size(t.family, solution) for t in typed}
    order = {name: i for i, name in enumerate(solution.lab.touched)}
    shrink = Shrink(solution)
    out, names = [], Counter[str]()
    for t in [t for t in typed if t.block is None]:
        names[t.kind] += 1
        name = t.kind if names[t.kind] == 1 else f"{t.kind}_{names[t.kind] - 1}"
        made = [
            _build(
                t, f, solution, order, shrink, name, None, lambda n: _everywhere(n, small, stands)
            )
            for f in [t.family, *t.spare]
        ]
        made[0].spare = made[1:]
        out.append(made[0])
    local = sorted(
        (t for t in typed if t.block), key=lambda t: min(order[n] for n, _ in t.family.names)
    )
    for path, kinds in stands.items():
        for i, standin in enumerate(kinds):
            for t in local:
                if t.block != (path, standin):
                    continue
                layer = shown[path, i]
                same = sorted(
                    (o for o in local if (o.kind, o.block) == (t.kind, t.block)),
                    key=lambda o: -sizes[id(o)],
                )
                name = f"{t.kind}.{layer}" + (f".{same.index(t)}" if t is not same[0] else "")
                expert = next(
                    (
                        k
                        for o in local
                        if o.block == t.block
                        for k, m in enumerate(o.modules)
                        if t.family.names[0][0].startswith(m + ".")
                    ),
                    None,
                )
                name = name if expert is None else f"{t.kind}.{layer}.e{expert}"
                here, there = f"{path}.{standin}.", f"{path}.{i}."

                def rename(n: str, here: str = here, there: str = there) -> list[str]:
                    return [
                        (there + (n + ".")[len(here) :])[:-1] if (n + ".").startswith(here) else n
                    ]

                made = [
                    _build(t, f, solution, order, shrink, name, layer, rename)
                    for f in [t.family, *t.spare]
                ]
                made[0].spare = made[1:]
                for candidate in made:
                    candidate.block = there[:-1]
                out.append(made[0])
    not_sizes = numbers(real)
    for candidate in [o for c in out for o in (c, *c.spare)]:
        candidate.numbers = not_sizes
    return out


def _size(f: Family, solution: Solution) -> int:
    """Elements that a family's units own, in matrices of which the other sides are counted as
    labelled.
    """
    sides: dict[str, int] = defaultdict(lambda: 1)
    for axis in solution.lab.axes:
        sides[axis.name] *= axis.size
    return sum(
        sides[solution.axis(a).name] * v.size // solution.axis(a).size for a, v in f.axes.items()
    )


def _everywhere(name: str, small: nn.Module, stands: dict[str, list[int]]) -> list[str]:
    """All real names that a skeleton's name stands for."""
    place = block_of(name, block_lists(small))
    if place is None:
        return [name]
    path, standin = place
    rest = name[len(f"{path}.{standin}") :]
    return [f"{path}.{i}{rest}" for i, kind in enumerate(stands[path]) if kind == standin]


def _build(
    t, f: Family, solution: Solution, order, shrink, name: str, layer: int | None, rename
) -> Candidate:  # type: ignore[no-untyped-def]
    keys = sorted(zip(f.names, f.axes.values(), strict=True), key=lambda item: order[item[0][0]])
    members = [
        Member(real, dim, torch.from_numpy(index.copy()), (n, dim) in solution.lab.read)
        for (n, dim), index in keys
        for real in rename(n)
    ]
    if layer is None:
        members = _by_block(members)
    facts = shrink(f)
    counted = {f.n: Counter({1: 1})} if t.kind == "experts" else {}
    extents = {
        real: {**counted, **sizes}
        for scope, sizes in facts.extents.items()
        for real in rename(scope)
    }
    group = Group(
        name,
        t.kind,
        layer,
        f.n,
        tuple(members),
        tuple(real for m in t.modules for real in rename(m)),
    )
    norms = [real for scope in facts.norms for real in rename(scope)]
    arguments = [replace(a, module=real) for a in facts.arguments for real in rename(a.module)]
    return Candidate(group, pattern_of(t.kind, f.names), extents, norms, arguments, facts.least)


def _by_block(members: list[Member]) -> list[Member]:
    """Members of a network-wide group, block by block where the skeleton's order repeats."""
    first: dict[str, int] = {}
    for i, m in enumerate(members):
        first.setdefault(re.sub(r"\d+", "#", m.param), i)
    block = [int(n[0]) if (n := re.findall(r"\.(\d+)\.", m.param)) else -1 for m in members]
    numbered = [i for i, b in enumerate(block) if b >= 0]
    head = [m for i, m in enumerate(members) if block[i] < 0 and (not numbered or i < numbered[0])]
    tail = [m for i, m in enumerate(members) if block[i] < 0 and numbered and i > numbered[0]]
    return (
        head
        + sorted(
            (members[i] for i in numbered), key=lambda m: int(re.findall(r"\.(\d+)\.", m.param)[0])
        )
        + tail
    )


@dataclass(frozen=True)
class Facts:
    """What removal has to know about a family, in the skeleton's names."""

    extents: Extents
    norms: list[str]
    arguments: list[Argument]
    least: int


class Shrink:
    """How much the extents seen inside each module shrink when one unit of a family goes."""

    def __init__(self, solution: Solution):
        self.solution = solution
        self._known: dict[int, Facts] = {}
        self.scopes: dict[str, set[bytes]] = defaultdict(set)
        for scope, keys in solution.lab.seen.items():
            for outer in _outer(scope):
                self.scopes[outer] |= keys
        self.axes: dict[str, list[int]] = defaultdict(list)
        for i, axis in enumerate(solution.lab.axes):
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
        memo = {key: self._shrinks(m, unit) for key, m in self.solution.lab.matrices.items()}
        touched = {
            outer for a in f.axes for outer in _outer(self.solution.axis(a).name.rpartition(".")[0])
        }
        for scope, keys in self.solution.lab.seen.items():
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
            for scope, labels in self.solution.lab.statistics
            if np.isin(self.solution.cls[labels], members).any()
        ]
        return list(dict.fromkeys(hit))

    def least(self, f: Family) -> int:
        """How many units a top-k over them picks: so many must stay."""
        members = np.array(sorted({c for u in f.units for c in u}))
        return max(
            (
                k
                for labels, k in self.solution.lab.least
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
        for storage, dim, rank, labels, where in self.solution.lab.constants:
            units = np.array([owner.get(int(c), -1) for c in self.solution.cls[labels]])
            counts = np.bincount(units[units >= 0], minlength=f.n)
            if not counts.any() or len(set(counts)) > 1:
                continue
            index = np.argsort(units, kind="stable")[(units < 0).sum() :].reshape(f.n, -1)
            given = [
                g
                for g in self.solution.lab.arguments.get(storage, ())
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
