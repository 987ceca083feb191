"""Labels on every index of every parameter axis, carried through one traced forward pass.

A *label* is a positive integer; 0 means "none". A tensor has a few *fields*: int64 tensors of its own rank, of size 1 along the dims where
the label does not change (the reduced form), so the dims with size > 1 are those along which the field varies. Fields live on storages, hence
views, slices, permutations and in-place writes into views need no rule. What the pass leaves behind is plain data: equalities between
labels, clauses "this label stands for that set of labels", and the label matrices that occurred.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NEUTRAL = {"t", "transpose", "permute", "expand", "detach", "alias", "unsqueeze", "squeeze", "_conj"}
"""Views that show no new extent."""
CHOOSES = {"topk", "sort", "argsort", "argmax", "argmin", "multinomial", "nonzero"}
"""Ops whose integer results depend on values."""
PAIR = 1 << 31
"""Two labels in one int64: `a * PAIR + b`."""


def tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers and plain tensor attributes under their first names, each object once."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, Tensor)}
        for leaf, value in [*module._parameters.items(), *module._buffers.items(), *plain.items()]:
            if value is not None and id(value) not in seen:
                seen.add(id(value))
                yield (f"{path}.{leaf}" if path else leaf), value


def varying(f: Tensor) -> tuple[int, ...]:
    """Dims along which a reduced field varies."""
    return tuple(i for i, n in enumerate(f.shape) if n > 1)


def reduced(f: Tensor) -> Tensor:
    """Size 1 along every dim where the labels agree; unlabelled cells (padding, tril, rows never hit) agree with anything."""
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


@dataclass(frozen=True)
class Axis:
    """One labelled axis: index i of axis `dim` of the tensor `name` has label `base + i`."""

    name: str
    dim: int
    size: int
    base: int


@dataclass
class Owned:
    """A parameter's layout in its storage."""

    name: str
    offset: int
    numel: int
    stride: tuple[int, ...]
    axes: list[Axis]


@dataclass
class Cell:
    """Fields of an activation's storage: as written (`fields` at one geometry) or spread over the storage (`flats`)."""

    geometry: tuple[Any, ...]
    itemsize: int
    fields: list[Tensor] | None
    flats: list[Tensor]


@dataclass(frozen=True)
class Op:
    """One ATen call with its tensors flattened."""

    name: str
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    ins: list[Tensor]
    outs: list[Tensor]
    mutable: bool

    def get(self, position: int, name: str, default: Any = None) -> Any:
        if len(self.args) > position:
            return self.args[position]
        return self.kwargs.get(name, default)


class Labels(TorchDispatchMode):
    """Follow labels through whatever runs inside the `with`; `skip` names axes `(tensor name, dim)` that get none."""

    def __init__(self, model: nn.Module, skip: frozenset[tuple[str, int]] = frozenset()):
        super().__init__()
        self.axes: list[Axis] = []
        self.edges: list[np.ndarray] = []
        self.clauses: list[tuple[int, np.ndarray]] = []
        self.matrices: dict[bytes, np.ndarray] = {}
        self.seen: dict[str, set[bytes]] = defaultdict(set)
        self.flags: dict[str, list[np.ndarray]] = defaultdict(list)
        self.statistics: list[tuple[str, np.ndarray]] = []
        self.constants: list[tuple[int, int, int, np.ndarray, str]] = []
        self.arguments: dict[int, list[tuple[str, int | str, tuple[int, ...]]]] = defaultdict(list)
        self.least: list[tuple[np.ndarray, int]] = []
        self.picks: list[tuple[str, int, int]] = []
        self.opaque: set[str] = set()
        self.touched: dict[str, dict[int, np.ndarray]] = {}
        self.scope = [""]
        self.next = 1
        self._owned: dict[int, list[Owned]] = defaultdict(list)
        self._cells: dict[int, Cell] = {}
        self._views: dict[tuple[Any, ...], list[Tensor]] = {}
        self._sets: dict[bytes, int] = {}
        self._related: dict[bytes, str] = {}
        self._products: dict[bytes, np.ndarray] = {}
        self._alive: list[Tensor] = []
        self._chosen: set[int] = set()
        for name, p in tensors(model):
            if p.is_floating_point() and p.numel() > 1:
                self._own(name, p, skip)

    def _own(self, name: str, p: Tensor, skip: frozenset[tuple[str, int]]) -> None:
        axes = []
        for dim, size in enumerate(p.shape):
            if size > 1 and (name, dim) not in skip:
                axes.append(Axis(name, dim, size, self.next))
                self.next += size
        self.axes += axes
        self._alive.append(p)
        self._owned[p.untyped_storage()._cdata].append(Owned(name, p.storage_offset(), p.numel(), p.stride(), axes))

    # ---- fields of tensors

    def labelled(self, t: Tensor) -> bool:
        key = t.untyped_storage()._cdata
        return key in self._cells or key in self._owned

    def fields(self, t: Tensor) -> list[Tensor]:
        """Reduced fields of any tensor; those that overlap after two axes were merged become one field of product labels."""
        key = t.untyped_storage()._cdata
        cell = self._cells.get(key)
        if cell is None:
            owned = next((o for o in self._owned.get(key, ()) if o.offset <= t.storage_offset() < o.offset + o.numel), None)
            return [] if owned is None else self._of_parameter(t, key, owned)
        if cell.itemsize != t.element_size():
            return []
        geometry = (t.size(), t.stride(), t.storage_offset())
        if cell.fields is not None and cell.geometry == geometry:
            return cell.fields
        found = [f.as_strided(*geometry) for f in self._spread(t, cell)]
        return self._separate([reduced(f) for f in found if f.numel() and bool((f > 0).any())])

    def _of_parameter(self, t: Tensor, key: int, owned: Owned) -> list[Tensor]:
        cache = (key, t.size(), t.stride(), t.storage_offset())
        if cache not in self._views:
            out = []
            for axis in owned.axes:
                coordinate = torch.full([1] * t.dim(), t.storage_offset() - owned.offset, dtype=torch.int64)
                for i, (n, stride) in enumerate(zip(t.shape, t.stride(), strict=True)):
                    steps = torch.arange(n) * stride
                    along = (coordinate.flatten()[0] + steps) // owned.stride[axis.dim] % axis.size
                    if n > 1 and bool((along != along[0]).any()):
                        coordinate = coordinate + steps.reshape([-1 if j == i else 1 for j in range(t.dim())])
                index = coordinate // owned.stride[axis.dim] % axis.size
                hit = self.touched.setdefault(owned.name, {}).setdefault(axis.dim, np.zeros(axis.size, dtype=bool))
                hit[index.reshape(-1).numpy()] = True
                if index.numel() > 1:
                    out.append(index + axis.base)
            self.touched.setdefault(owned.name, {})
            self._views[cache] = self._separate(out)
        return self._views[cache]

    def _spread(self, t: Tensor, cell: Cell) -> list[Tensor]:
        """The cell's fields laid out over the whole storage, one label per element."""
        if cell.fields is not None:
            size, stride, offset = cell.geometry
            cell.flats = []
            for f in cell.fields:
                flat = torch.zeros(t.untyped_storage().nbytes() // cell.itemsize, dtype=torch.int64)
                flat.as_strided(size, stride, offset).copy_(f.expand(size))
                cell.flats.append(flat)
            cell.fields = [f for f in cell.fields]
        return cell.flats

    def write(self, t: Tensor, fields: Sequence[Tensor]) -> None:
        """Give `t` these fields (reduced or not, broadcastable to its shape), in place of what its region of the storage had."""
        if t.numel() == 0:
            return
        key, geometry = t.untyped_storage()._cdata, (t.size(), t.stride(), t.storage_offset())
        cell = self._cells.get(key)
        fields = sorted((reduced(f) for f in fields), key=varying)
        if t.numel() * t.element_size() >= t.untyped_storage().nbytes() and 0 not in [s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1]:
            if fields or cell is not None:
                self._cells[key] = Cell(geometry, t.element_size(), self._separate(list(fields)), [])
                self._alive.append(t)
            return
        if cell is None:
            if not fields:
                return
            cell = self._cells[key] = Cell((), t.element_size(), [], [])
            self._alive.append(t)
        flats = self._spread(t, cell) if cell.geometry else cell.flats
        for flat in flats:
            flat.as_strided(*geometry).zero_()
        for i, f in enumerate(fields):
            if i == len(flats):
                flats.append(torch.zeros(t.untyped_storage().nbytes() // cell.itemsize, dtype=torch.int64))
            flats[i].as_strided(*geometry).copy_(f.expand(t.shape))
        cell.fields, cell.flats, cell.geometry = None, flats, ()

    # ---- relations between labels

    def set_label(self, members: np.ndarray) -> int:
        """The label that stands for a set of labels: gone when all of them are, and they go with it. 0 for the empty set."""
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
        """What is left of a field along `dims`: each label there stands for the set that it had over the other dims."""
        rest = [i for i in range(f.dim()) if i not in dims]
        rows = f.permute(*dims, *rest).reshape(int(np.prod([f.size(i) for i in dims])), -1).numpy()
        labels = rows[:, 0].copy() if rows.shape[1] == 1 else np.array([self.set_label(r) for r in rows], dtype=np.int64)
        return torch.from_numpy(labels).reshape([f.size(i) if i in dims else 1 for i in range(f.dim())])

    def relate(self, a: Tensor, b: Tensor) -> str:
        """Two fields meet element by element: 'same', or which of them ('a', 'b') is the finer one.

        One to one is an equality; where many labels of one meet a single label of the other (broadcast, repeated kv heads), the single
        one stands for the set of the many. Many to many becomes an equality: sound, but it couples more than it must.
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
        """One field that knows both: a label per pair, unless one of the two already determines the other."""
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
        return [f for f in done if not any(set(varying(f)) < set(varying(g)) and not bool(((f > 0) & (g == 0)).any()) for g in done)]

    # ---- notes for the solver

    def flag(self, name: str, f: Tensor) -> None:
        labels = np.unique(f.numpy())
        self.flags[name].append(labels[labels > 0])
        if name == "statistic":
            self.statistics.append((self.scope[-1], labels[labels > 0]))

    def note(self, f: Tensor) -> None:
        """Remember an extent (one varying dim) or a label matrix (several) and the module in which it occurred."""
        if len(varying(f)):
            self.seen[self.scope[-1]].add(self._keep_matrix(f.squeeze().numpy()))

    def _keep_matrix(self, m: np.ndarray) -> bytes:
        key = repr(m.shape).encode() + np.ascontiguousarray(m).tobytes()
        if key not in self.matrices:
            self.matrices[key] = np.array(m)
        return key

    def note_constant(self, t: Tensor, rank: int, fields: Sequence[Tensor]) -> None:
        """An unlabelled operand whose values change along a labelled dim: its units cannot go unless the operand is sliced too."""
        if t.dim() == 0 or t.numel() == 1 or t.is_meta:
            return
        for i in varying_values(t):
            d = i - t.dim() + rank
            for f in fields:
                if f.size(d) > 1:
                    along = self.group(f, [d])
                    self.constants.append((t.untyped_storage()._cdata, i, t.dim(), along.reshape(-1).numpy().copy(), self.scope[-1]))

    # ---- the dispatch itself

    def execute(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        from prunekit.graph.rules import CREATES, apply

        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        base = name[:-1] if name.endswith("_") and not name.endswith("__") else name
        out = self.execute(base, func, args, kwargs)
        if base in ("view_as_complex", "view_as_real"):
            out = out.clone()
        ins = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        self._alive += outs
        self._note_chosen(base, ins, outs)
        if not outs or base in CREATES or not any(self.labelled(t) for t in ins):
            return out
        op = Op(base, func, args, kwargs, ins, outs, func._schema.is_mutable)
        storages = {t.untyped_storage()._cdata for t in ins}
        if not op.mutable and all(t.untyped_storage()._cdata in storages for t in outs):
            if base not in NEUTRAL:
                for f in [f for t in outs for f in self.fields(t)]:
                    self.note(f)
        else:
            apply(self, op)
        return out


    def _note_chosen(self, name: str, ins: list[Tensor], outs: list[Tensor]) -> None:
        """Integers that say what data chose (token ids, top-k, and what is computed from them): indexing by them follows no channel."""
        if name in CHOOSES or any(t.untyped_storage()._cdata in self._chosen for t in ins):
            self._chosen |= {t.untyped_storage()._cdata for t in outs if not t.is_floating_point()}

    def chosen(self, index: Any) -> bool:
        return any(isinstance(t, Tensor) and t.untyped_storage()._cdata in self._chosen for t in tree_leaves(index))


def varying_values(t: Tensor) -> tuple[int, ...]:
    """Dims along which the values of a tensor differ."""
    t = t.detach()
    for i, n in enumerate(t.shape):
        if n > 1 and t.stride(i) == 0:
            t = t.narrow(i, 0, 1)
    return tuple(i for i, n in enumerate(t.shape) if n > 1 and not torch.equal(t.narrow(i, 0, 1).expand_as(t), t))


def trace(model: nn.Module, inputs: dict[str, Any], labels: Labels | None = None) -> tuple[Labels, Any]:
    """One forward pass under `labels` (default: fresh ones), recording for each op the module in which it ran."""
    labels = labels or Labels(model)
    hooks = []
    for name, module in model.named_modules():

        def enter(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            labels.scope.append(name)
            for where, t in [*enumerate(args), *kwargs.items()]:
                if name and isinstance(t, Tensor) and t.dim():
                    labels.arguments[t.untyped_storage()._cdata].append((name, where, tuple(t.shape)))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            labels.scope.pop()

        hooks += [module.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(leave)]
    try:
        labels._chosen |= {t.untyped_storage()._cdata for t in inputs.values() if isinstance(t, Tensor)}
        with torch.no_grad(), labels:
            output = model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return labels, output
