"""What labels say about each other: equalities, and clauses "this label stands for that set"; plain
data for the solver.

A field is an int64 tensor of labels in reduced form: of size 1 along the dims where the label does
not change.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

PAIR = 1 << 31
"""Two labels in one int64: `a * PAIR + b`."""


def varying(f: Tensor) -> tuple[int, ...]:
    """Dims along which a reduced field varies."""
    return tuple(i for i, n in enumerate(f.shape) if n > 1)


def reduced(f: Tensor) -> Tensor:
    """Size 1 along every dim where the labels agree; unlabelled cells (padding, tril, rows never
    hit) agree with anything.
    """
    for i, n in enumerate(f.shape):
        if n > 1 and f.stride(i) == 0:
            f = f.narrow(i, 0, 1)
    for i, n in enumerate(f.shape):
        if n > 1:
            top = f.amax(i, keepdim=True)
            if not bool(((f != top) & (f > 0)).any()):
                f = top
    return f


def ranked(f: Tensor, rank: int) -> Tensor:
    """The field with leading dims of size 1 up to `rank`."""
    return f.reshape((1,) * (rank - f.dim()) + tuple(f.shape)) if f.dim() < rank else f


class Relations:
    """Labels are handed out from `next` on; `scope` is the stack of modules that run."""

    def __init__(self) -> None:
        self.edges: list[np.ndarray] = []
        self.clauses: list[tuple[int, np.ndarray]] = []
        self.matrices: dict[bytes, np.ndarray] = {}
        self.seen: dict[str, set[bytes]] = defaultdict(set)
        self.scope = [""]
        self.next = 1
        self._sets: dict[bytes, int] = {}
        self._related: dict[bytes, str] = {}
        self._products: dict[bytes, np.ndarray] = {}

    def set_label(self, members: np.ndarray) -> int:
        """The label that stands for a set of labels: gone when all of them are, and they go with
        it. 0 for the empty set.
        """
        u = np.unique(members)
        u = u[u > 0]
        if len(u) < 2:
            return int(u[0]) if len(u) else 0
        key = u.tobytes()
        if key not in self._sets:
            self._sets[key] = self.next
            self.clauses.append((self.next, u))
            self.next += 1
        return self._sets[key]

    def group(self, f: Tensor, dims: Sequence[int]) -> Tensor:
        """What is left of a field along `dims`: each label there stands for the set that it had
        over the other dims.
        """
        rest = [i for i in range(f.dim()) if i not in dims]
        rows = f.permute(*dims, *rest).reshape(int(np.prod([f.size(i) for i in dims])), -1).numpy()
        labels = (
            rows[:, 0].copy()
            if rows.shape[1] == 1
            else np.array([self.set_label(r) for r in rows], dtype=np.int64)
        )
        return torch.from_numpy(labels).reshape(
            [f.size(i) if i in dims else 1 for i in range(f.dim())]
        )

    def relate(self, a: Tensor, b: Tensor) -> str:
        """Two fields meet element by element: 'same', or which of them ('a', 'b') is the finer one.

        One to one is an equality; where many labels of one meet a single label of the other
        (broadcast, repeated kv heads), the single one stands for the set of the many. Many to many
        becomes an equality: sound, but it couples more than it must.
        """
        a, b = torch.broadcast_tensors(a, b)
        differ = (a > 0) & (b > 0) & (a != b)
        if not bool(differ.any()):
            return "same"
        pairs = np.unique((a[differ] * PAIR + b[differ]).numpy())
        key = pairs.tobytes()
        if key not in self._related:
            self._related[key] = self._relate_pairs(pairs // PAIR, pairs % PAIR)
        return self._related[key]

    def _relate_pairs(self, a: np.ndarray, b: np.ndarray) -> str:
        distinct_a, distinct_b = len(np.unique(a)), len(np.unique(b))
        if len(a) == distinct_a != distinct_b:
            self._stand_for(b, a)
            return "a"
        if len(b) == distinct_b != distinct_a:
            self._stand_for(a, b)
            return "b"
        self.edges.append(np.stack([a, b], 1))
        return "same"

    def _stand_for(self, coarse: np.ndarray, fine: np.ndarray) -> None:
        order = np.argsort(coarse, kind="stable")
        labels, start = np.unique(coarse[order], return_index=True)
        for label, members in zip(labels, np.split(fine[order], start[1:]), strict=True):
            self.edges.append(np.array([[self.set_label(members), label]]))

    def product(self, f: Tensor, g: Tensor) -> Tensor:
        """One field that knows both: a label per pair, unless one of the two already determines the
        other.
        """
        a, b = torch.broadcast_tensors(f, g)
        both = (a > 0) & (b > 0)
        pairs, inverse = np.unique((a[both] * PAIR + b[both]).numpy(), return_inverse=True)
        key = pairs.tobytes()
        if key not in self._products:
            self._products[key] = self._pair_labels(pairs // PAIR, pairs % PAIR)
        out = torch.where(a > 0, a, b).clone()
        out[both] = torch.from_numpy(self._products[key][inverse.reshape(-1)])
        return out

    def _pair_labels(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        distinct_a, distinct_b = len(np.unique(a)), len(np.unique(b))
        if len(a) == distinct_a or len(a) == distinct_b:
            self._relate_pairs(a, b)
            return (a if len(a) == distinct_a else b).copy()
        labels = np.arange(self.next, self.next + len(a))
        self.next += len(a)
        self._stand_for(a, labels)
        self._stand_for(b, labels)
        if len(a) == distinct_a * distinct_b:
            self._keep_matrix(labels.reshape(distinct_a, distinct_b))
        return labels

    def _separate(self, fields: list[Tensor]) -> list[Tensor]:
        """Fields of one tensor no two of which vary along the same dim."""
        todo, out = list(fields), list[Tensor]()
        while todo:
            f = todo.pop(0)
            for i, g in enumerate(out):
                if not set(varying(f)) & set(varying(g)):
                    continue
                a, b = torch.broadcast_tensors(f, g)
                both = (a > 0) & (b > 0)
                if bool(both.any()):
                    f = f if torch.equal(a, b) else self.product(f, g)
                elif varying(f) == varying(g):
                    f = torch.where(a > 0, a, b)
                else:
                    continue
                out.pop(i)
                todo.insert(0, f)
                break
            else:
                out.append(f)
        return out

    def merge(self, fields: Sequence[Tensor]) -> list[Tensor]:
        """Fields of equal rank that meet in an op -> the fields of its result."""
        done: list[Tensor] = []
        for f in fields:
            f = reduced(f)
            if not varying(f):
                continue
            self.note(f)
            i, absorbed = 0, False
            while i < len(done):
                g = done[i]
                v, w = set(varying(f)), set(varying(g))
                common = sorted(v & w)
                if v == w:
                    finer = self.relate(f, g)
                    done[i] = torch.where(f > 0, f, g) if finer == "a" else torch.where(g > 0, g, f)
                    absorbed = True
                elif common:
                    finer = self.relate(self.group(f, common), self.group(g, common))
                    if finer == "a" and v < w:
                        done[i], absorbed = self.product(f, g), True
                    elif finer == "b" and w < v:
                        f = self.product(f, g)
                        done.pop(i)
                        self.note(f)
                        continue
                i += 1
            if not absorbed:
                done.append(f)
        return [
            f
            for f in done
            if not any(
                set(varying(f)) < set(varying(g)) and not bool(((f > 0) & (g == 0)).any())
                for g in done
            )
        ]

    def note(self, f: Tensor) -> None:
        """Remember an extent (one varying dim) or a label matrix (several) and the module in which
        it occurred.
        """
        if len(varying(f)):
            self.seen[self.scope[-1]].add(self._keep_matrix(f.squeeze().numpy()))

    def _keep_matrix(self, m: np.ndarray) -> bytes:
        key = repr(m.shape).encode() + np.ascontiguousarray(m).tobytes()
        if key not in self.matrices:
            self.matrices[key] = np.array(m)
        return key
