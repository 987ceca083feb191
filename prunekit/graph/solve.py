"""From labels to units: which labels are one thing, what must go together, and which sets of slices
can be cut out at all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from prunekit.graph.labels import Axis, Labels


@dataclass
class Family:
    """Units that cut equally much from the same tensors: row u of `index[axis number]` is what unit
    u owns there.
    """

    units: list[tuple[int, ...]]
    axes: dict[int, np.ndarray]
    flags: frozenset[str]
    names: tuple[tuple[str, int], ...] = field(default=())

    @property
    def n(self) -> int:
        return len(self.units)


def components(n: int, edges: np.ndarray) -> np.ndarray:
    """Connected components of a graph on 0..n-1: the smallest member of each node's component."""
    root = np.arange(n)
    while True:
        a, b = root[edges[:, 0]], root[edges[:, 1]]
        if (a == b).all():
            return root
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(jumped := root[root], root):
            root = jumped


class Solution:
    """Classes of equal labels, and the clauses between them.

    A clause `g = {members}` works both ways: g gone -> all members gone; all members gone -> g
    gone.
    """

    def __init__(self, labels: Labels):
        self.labels = labels
        self.cls = self._classes()
        own = [np.arange(a.base, a.base + a.size) for a in labels.axes]
        owner = np.repeat(np.arange(len(labels.axes)), [a.size for a in labels.axes])
        index = (
            np.concatenate([np.arange(a.size) for a in labels.axes])
            if labels.axes
            else np.zeros(0, int)
        )
        classes = self.cls[np.concatenate(own)] if own else np.zeros(0, int)
        order = np.lexsort((index, owner, classes))
        self._owner, self._index, self._sorted = owner[order], index[order], classes[order]
        marks = np.random.default_rng(0).integers(1, 1 << 62, len(labels.axes), dtype=np.uint64)
        self.signature = np.zeros(labels.next, dtype=np.uint64)
        np.add.at(self.signature, self._sorted, marks[self._owner])
        self._by_head, self._by_member = (
            defaultdict[int, list[int]](list),
            defaultdict[int, list[int]](list),
        )
        for i, (head, members) in enumerate(self.rules):
            self._by_head[head].append(i)
            for m in members:
                self._by_member[m].append(i)
        self.flagged = {
            name: set(np.unique(self.cls[np.concatenate(v)]).tolist())
            for name, v in labels.flags.items()
            if v
        }
        self._matrices = [m for m in labels.matrices.values() if m.ndim > 1]
        self.in_matrix = defaultdict[int, list[int]](list)
        for i, matrix in enumerate(self._matrices):
            for c in np.unique(self.cls[matrix[matrix > 0]]).tolist():
                self.in_matrix[c].append(i)
        self._copies: dict[tuple[int, int], np.ndarray] = {}

    def _classes(self) -> np.ndarray:
        """Fixpoint: sets with equal member classes are one thing; a set with a single member class
        is that member.
        """
        edges = (
            np.concatenate(self.labels.edges)
            if self.labels.edges
            else np.zeros((0, 2), dtype=np.int64)
        )
        while True:
            cls = components(self.labels.next, edges)
            first: dict[tuple[int, ...], int] = {}
            more = []
            for g, members in self.labels.clauses:
                key = tuple(np.unique(cls[members]).tolist())
                other = key[0] if len(key) == 1 else first.setdefault(key, g)
                if cls[g] != cls[other]:
                    more.append((g, other))
            if not more:
                self.rules = [(int(cls[g]), members) for members, g in first.items()]
                return cls
            edges = np.concatenate([edges, np.array(more)])

    def closure(self, seed: Iterable[int]) -> frozenset[int]:
        """Everything that goes when the seed's classes go."""
        gone, todo, count = set[int](), list(seed), defaultdict[int, int](int)
        while todo:
            c = todo.pop()
            if c in gone:
                continue
            gone.add(c)
            for i in self._by_head.get(c, ()):
                todo += self.rules[i][1]
            for i in self._by_member.get(c, ()):
                count[i] += 1
                if count[i] == len(self.rules[i][1]):
                    todo.append(self.rules[i][0])
        return frozenset(gone)

    def slices(self, classes: Iterable[int]) -> dict[int, np.ndarray]:
        """axis number -> ascending indices that the classes own there."""
        c = np.fromiter(classes, dtype=np.int64)
        lo, hi = np.searchsorted(self._sorted, c, "left"), np.searchsorted(self._sorted, c, "right")
        at = (
            np.concatenate([np.arange(a, b) for a, b in zip(lo, hi, strict=True)])
            if len(c)
            else np.zeros(0, int)
        )
        owner, index = self._owner[at], self._index[at]
        return {int(a): np.sort(index[owner == a]) for a in np.unique(owner)}

    def rectangular(self, unit: frozenset[int]) -> bool:
        """Whether in every label matrix that occurred the unit is a union of whole slabs, so that
        it can be cut out.
        """
        for i in {i for c in unit for i in self.in_matrix.get(c, ())}:
            m = self._matrices[i]
            gone = np.isin(self.cls[m], list(unit)) & (m > 0)
            covered = np.zeros_like(gone)
            for d in range(m.ndim):
                others = tuple(j for j in range(m.ndim) if j != d)
                whole = (gone | (m == 0) | self._copied(i, d)).all(axis=others, keepdims=True)
                covered |= whole & gone.any(axis=others, keepdims=True)
            if (gone & ~covered).any():
                return False
        return True

    def _copied(self, i: int, d: int) -> np.ndarray:
        """Cells whose label occurs again along dim d: broadcast copies do not constrain."""
        if (i, d) not in self._copies:
            m = self._matrices[i]
            order = np.argsort(m, axis=d, kind="stable")
            same = np.diff(np.take_along_axis(m, order, d), axis=d) == 0
            pad = [(0, 0)] * m.ndim
            pad[d] = (1, 0)
            repeated = np.pad(same, pad)
            pad[d] = (0, 1)
            repeated |= np.pad(same, pad)
            out = np.zeros(m.shape, dtype=bool)
            np.put_along_axis(out, order, repeated, d)
            self._copies[i, d] = out
        return self._copies[i, d]

    # ---- families

    def families(self) -> list[Family]:
        """All sets of at least two closed, equal-sized, rectangular units; vocabulary rows are left
        out.
        """
        out = []
        for units in self._candidates():
            if len(units) < 2:
                continue
            first = self.slices(units[0])
            if not first or any(len(v) >= self.labels.axes[a].size for a, v in first.items()):
                continue
            if not all(self.rectangular(frozenset(u)) for u in units):
                continue
            axes = self._stacked(units)
            order = np.argsort(next(iter(axes.values()))[:, 0], kind="stable")
            members = set().union(*map(set, units))
            flags = frozenset(name for name, classes in self.flagged.items() if classes & members)
            out.append(
                Family([units[i] for i in order], {a: v[order] for a, v in axes.items()}, flags)
            )
        return out

    def _stacked(self, units: list[tuple[int, ...]]) -> dict[int, np.ndarray]:
        """axis number -> (unit, width) indices; units of a single class are looked up
        all at once.
        """
        if any(len(u) > 1 for u in units):
            slices = [self.slices(u) for u in units]
            return {a: np.stack([s[a] for s in slices]) for a in slices[0]}
        classes = np.array([u[0] for u in units])
        start = np.searchsorted(self._sorted, classes, "left")
        width = int(np.searchsorted(self._sorted, classes[0], "right") - start[0])
        rows = start[:, None] + np.arange(width)
        owner, index = self._owner[rows], self._index[rows]
        return {int(a): index[:, owner[0] == a] for a in np.unique(owner[0])}

    def _candidates(self) -> list[list[tuple[int, ...]]]:
        rows = self.flagged.get("row", set())
        coupled = set(self._by_head) | set(self._by_member)
        found: dict[int, list[tuple[int, ...]]] = defaultdict(list)
        alone = np.setdiff1d(
            np.unique(self._sorted),
            np.fromiter(coupled | rows, dtype=np.int64, count=len(coupled | rows)),
        )
        for signature in np.unique(self.signature[alone]):
            found[int(signature)] += [(int(c),) for c in alone[self.signature[alone] == signature]]
        seen = set[frozenset[int]]()
        for seed in self._seeds(coupled):
            unit = self.closure(seed)
            if unit in seen or unit & rows:
                continue
            seen.add(unit)
            signature = int(self.signature[list(unit)].sum())
            if signature and (
                len(unit) > 1 or not found[signature] or next(iter(unit)) not in alone
            ):
                found[signature].append(tuple(sorted(unit)))
        return [part for units in found.values() for part in _disjoint(units)]

    def _seeds(self, coupled: set[int]) -> Iterable[tuple[int, ...]]:
        for c in coupled:
            yield (c,)
        for m in self._matrices:
            classes = self.cls[m]
            for d in range(m.ndim):
                for i in range(m.shape[d]):
                    labels = classes.take(i, axis=d)[m.take(i, axis=d) > 0]
                    if len(labels):
                        yield tuple(np.unique(labels).tolist())

    def axis(self, number: int) -> Axis:
        return self.labels.axes[number]


def _disjoint(units: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Units that overlap are no units of one family: where heads are as many as channels per head,
    both look alike.
    """
    if len({c for u in units for c in u}) == sum(map(len, units)):
        return [units] if units else []
    parts: list[tuple[set[int], list[tuple[int, ...]]]] = []
    for u in units:
        part = next((p for p in parts if not p[0] & set(u)), None)
        if part is None:
            parts.append((set(u), [u]))
        else:
            part[0].update(u)
            part[1].append(u)
    return [members for _, members in parts]
