"""Labels on every index of every parameter axis, and the fields of labels that tensors carry.

A *label* is a positive integer; 0 means "none". A tensor has a few *fields*: int64 tensors of its
own rank, of size 1 along the dims where the label does not change (the reduced form), so the dims
with size > 1 are those along which the field varies. Fields live on storages, hence views, slices,
permutations and in-place writes into views need no rule. What the pass leaves behind is plain data:
equalities between labels, clauses "this label stands for that set of labels", and the label
matrices that occurred.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prunekit.graph.relations import Relations, reduced, varying


def tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers and plain tensor attributes under their first names, each object once."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, Tensor)}
        for leaf, value in [*module._parameters.items(), *module._buffers.items(), *plain.items()]:
            if value is not None and id(value) not in seen:
                seen.add(id(value))
                yield (f"{path}.{leaf}" if path else leaf), value


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
    """Fields of an activation's storage: as written (`fields` at one geometry) or spread over the
    storage (`flats`).
    """

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


class Labels(Relations):
    """The fields of every tensor of a run, and notes about them; `skip` names axes `(tensor name,
    dim)` that get no labels.
    """

    def __init__(self, model: nn.Module, skip: frozenset[tuple[str, int]] = frozenset()):
        super().__init__()
        self.axes: list[Axis] = []
        self.flags: dict[str, list[np.ndarray]] = defaultdict(list)
        self.statistics: list[tuple[str, np.ndarray]] = []
        self.constants: list[tuple[int, int, int, np.ndarray, str]] = []
        self.arguments: dict[int, list[tuple[str, int | str, tuple[int, ...]]]] = defaultdict(list)
        self.least: list[tuple[np.ndarray, int]] = []
        self.picks: list[tuple[str, int, int]] = []
        self.opaque: set[str] = set()
        self.read: set[tuple[str, int]] = set()
        self.touched: dict[str, dict[int, np.ndarray]] = {}
        self._owned: dict[int, list[Owned]] = defaultdict(list)
        self._cells: dict[int, Cell] = {}
        self._views: dict[tuple[Any, ...], list[Tensor]] = {}
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
        self._owned[p.untyped_storage()._cdata].append(
            Owned(name, int(p.storage_offset()), p.numel(), p.stride(), axes)
        )

    # ---- fields of tensors

    def labelled(self, t: Tensor) -> bool:
        key = t.untyped_storage()._cdata
        return key in self._cells or key in self._owned

    def fields(self, t: Tensor) -> list[Tensor]:
        """Reduced fields of any tensor; those that overlap after two axes were merged become one
        field of product labels.
        """
        key = t.untyped_storage()._cdata
        cell = self._cells.get(key)
        if cell is None:
            owned = self._owner(t)
            return [] if owned is None else self._of_parameter(t, key, owned)
        if cell.itemsize != t.element_size():
            return []
        geometry = (t.size(), t.stride(), t.storage_offset())
        if cell.fields is not None and cell.geometry == geometry:
            return cell.fields
        found = [f.as_strided(*geometry) for f in self._spread(t, cell)]
        return self._separate([reduced(f) for f in found if f.numel() and bool((f > 0).any())])

    def _owner(self, t: Tensor) -> Owned | None:
        """The parameter that `t` is a view of."""
        return next(
            (
                o
                for o in self._owned.get(t.untyped_storage()._cdata, ())
                if o.offset <= t.storage_offset() < o.offset + o.numel
            ),
            None,
        )

    def _of_parameter(self, t: Tensor, key: int, owned: Owned) -> list[Tensor]:
        cache = (key, t.size(), t.stride(), t.storage_offset())
        if cache not in self._views:
            out = []
            for axis in owned.axes:
                start = int(t.storage_offset()) - owned.offset
                coordinate = torch.full([1] * t.dim(), start, dtype=torch.int64)
                for i, (n, stride) in enumerate(zip(t.shape, t.stride(), strict=True)):
                    steps = torch.arange(n) * stride
                    along = (coordinate.flatten()[0] + steps) // owned.stride[axis.dim] % axis.size
                    if n > 1 and bool((along != along[0]).any()):
                        coordinate = coordinate + steps.reshape(
                            [-1 if j == i else 1 for j in range(t.dim())]
                        )
                index = coordinate // owned.stride[axis.dim] % axis.size
                hit = self.touched.setdefault(owned.name, {}).setdefault(
                    axis.dim, np.zeros(axis.size, dtype=bool)
                )
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
        """Give `t` these fields (reduced or not, broadcastable to its shape), in place of what its
        region of the storage had.
        """
        if t.numel() == 0:
            return
        key, geometry = t.untyped_storage()._cdata, (t.size(), t.stride(), t.storage_offset())
        cell = self._cells.get(key)
        fields = sorted((reduced(f) for f in fields), key=varying)
        if t.numel() * t.element_size() >= t.untyped_storage().nbytes() and 0 not in [
            s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1
        ]:
            if fields or cell is not None:
                self._cells[key] = Cell(
                    geometry, t.element_size(), self._separate(list(fields)), []
                )
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
                flats.append(
                    torch.zeros(t.untyped_storage().nbytes() // cell.itemsize, dtype=torch.int64)
                )
            flats[i].as_strided(*geometry).copy_(f.expand(t.shape))
        cell.fields, cell.flats, cell.geometry = None, flats, ()

    # ---- notes for the solver

    def flag(self, name: str, f: Tensor) -> None:
        labels = np.unique(f.numpy())
        self.flags[name].append(labels[labels > 0])
        if name == "statistic":
            self.statistics.append((self.scope[-1], labels[labels > 0]))

    def note_read(self, t: Tensor, fields: Sequence[Tensor], dim: int) -> None:
        """Axes of a parameter over which a product sums: `dim` of the fields of its view `t`."""
        owned = self._owner(t)
        for axis in owned.axes if owned else ():
            ends = [f for f in fields if f.size(dim) > 1]
            if any(bool(((f >= axis.base) & (f < axis.base + axis.size)).any()) for f in ends):
                self.read.add((axis.name, axis.dim))

    def note_constant(self, t: Tensor, rank: int, fields: Sequence[Tensor]) -> None:
        """An unlabelled operand whose values change along a labelled dim: its units cannot go
        unless the operand is sliced too.
        """
        if t.dim() == 0 or t.numel() == 1 or t.is_meta:
            return
        for i in varying_values(t):
            d = i - t.dim() + rank
            for f in fields:
                if f.size(d) > 1:
                    along = self.group(f, [d])
                    self.constants.append(
                        (
                            t.untyped_storage()._cdata,
                            i,
                            t.dim(),
                            along.reshape(-1).numpy().copy(),
                            self.scope[-1],
                        )
                    )

    def chosen(self, index: Any) -> bool:
        return any(
            isinstance(t, Tensor) and t.untyped_storage()._cdata in self._chosen
            for t in tree_leaves(index)
        )


def varying_values(t: Tensor) -> tuple[int, ...]:
    """Dims along which the values of a tensor differ."""
    t = t.detach()
    for i, n in enumerate(t.shape):
        if n > 1 and t.stride(i) == 0:
            t = t.narrow(i, 0, 1)
    return tuple(
        i
        for i, n in enumerate(t.shape)
        if n > 1 and not torch.equal(t.narrow(i, 0, 1).expand_as(t), t)
    )
