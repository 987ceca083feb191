"""Rules for ops that move labels rather than relate them: lookups, stores, concatenation,
convolution, batched linear algebra.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from prunekit.graph.labels import Labels, Op
from prunekit.graph.relations import reduced, varying
from prunekit.graph.rules import rule


@rule("embedding")
def embedding(lab: Labels, op: Op) -> None:
    """Rows are picked by data: only the columns' labels live on."""
    weight, index = op.args[:2]
    kept = [f for f in lab.fields(weight) if f.size(0) == 1]
    lab.flag(
        "row",
        torch.cat(
            [f.reshape(-1) for f in lab.fields(weight) if f.size(0) > 1]
            or [torch.zeros(1, dtype=torch.int64)]
        ),
    )
    for f in kept:
        lab.flag("embedding", f)
    lab.write(op.outs[0], [f.reshape((1,) * index.dim() + (-1,)) for f in kept])


@rule("convolution _convolution conv1d mkldnn_convolution")
def convolution(lab: Labels, op: Op) -> None:
    """Depthwise: channel by channel; one group: a contraction over channels; between the two: group
    by group.
    """
    x, w = op.args[:2]
    out, groups = op.outs[0], op.args[8] if len(op.args) > 8 else op.get(6, "groups", 1)
    depthwise = groups == x.size(1) == out.size(1)
    channels = [f.reshape(-1) for f in lab.fields(w) if varying(f) == (0,)]
    lab.note_read(w, lab.fields(w), 1)
    if op.args[2] is not None:
        channels += [f.reshape(-1) for f in lab.fields(op.args[2])]
    for f in lab.fields(x):
        if f.size(1) == 1:
            continue
        c = lab.group(f, [1]).reshape(-1)
        lab.flag("convolved", c)
        if depthwise:
            channels.append(c)
        elif groups == 1:
            for g in lab.fields(w):
                if varying(g) == (1,):
                    lab.relate(c, g.reshape(-1))
        else:
            _by_group(
                lab,
                c.reshape(groups, -1),
                [f for f in channels if f.numel() == out.size(1)],
                lab.fields(w),
            )
    lab.write(out, lab.merge([f.reshape((1, -1) + (1,) * (out.dim() - 2)) for f in channels]))


def _by_group(lab: Labels, x: Tensor, outs: list[Tensor], weight: list[Tensor]) -> None:
    """A grouped convolution: group by group the channels in `x` (groups, width) and the channels
    out go together.
    """
    lab.note(x)
    for f in outs:
        f = f.reshape(x.size(0), -1)
        lab.note(f)
        lab.relate(lab.group(x, [0]), lab.group(f, [0]))
    for f in weight:
        if varying(f) == (1,):
            lab.relate(x, f.reshape(1, -1))


@rule(
    "index_put _index_put_impl _unsafe_index_put index_add index_copy scatter scatter_add "
    "scatter_reduce masked_scatter"
)
def store(lab: Labels, op: Op) -> None:
    """Write labelled values into places that data names."""
    target = op.args[0] if op.mutable else op.outs[0]
    fields = list(lab.fields(op.args[0]))
    put = op.name.strip("_").startswith(("index_put", "unsafe_index_put"))
    source: Any = op.args[2] if put else None if op.name == "masked_scatter" else op.args[3]
    for f in lab.fields(source) if isinstance(source, Tensor) else ():
        blank, f = torch.zeros(target.shape, dtype=torch.int64), f.expand(source.shape).contiguous()
        if put:
            fields.append(blank.index_put_(list(op.args[1]), f))
        else:
            fields.append(
                (blank.index_copy_ if op.name.startswith("index") else blank.scatter_)(
                    op.args[1], op.args[2], f
                )
            )
    lab.write(target, lab.merge(fields))


@rule("cat stack")
def concatenate(lab: Labels, op: Op) -> None:
    """Parts side by side; labels that run along the other dims are the same thing in every part."""
    dim = op.get(1, "dim", 0) % op.outs[0].dim()
    parts = [t for t in op.args[0] if t.dim() != 1 or t.numel()]
    fields = [[f.unsqueeze(dim) if op.name == "stack" else f for f in lab.fields(t)] for t in parts]
    out = []
    for dims in sorted({varying(f) for fs in fields for f in fs}):
        here = [next((f for f in fs if varying(f) == dims), None) for fs in fields]
        across = [i for i in dims if i != dim]
        groups = [lab.group(f, across) for f in here if f is not None] if across else []
        for a, b in pairwise(groups):
            lab.relate(a, b)
        if op.name == "stack" and across:
            out.append(next(f for f in here if f is not None))
            continue
        shapes = [t.unsqueeze(dim).shape if op.name == "stack" else t.shape for t in parts]
        blank = [
            torch.zeros(shape, dtype=torch.int64) if f is None else f.expand(shape)
            for f, shape in zip(here, shapes, strict=True)
        ]
        out.append(torch.cat(blank, dim))
    lab.write(op.outs[0], out)


@rule(
    "clone contiguous _to_copy lift_fresh_copy _conj_physical _unsafe_view index_select index "
    "_unsafe_index gather repeat flip roll tril triu "
    "constant_pad_nd unfold im2col repeat_interleave masked_select expand_copy permute_copy "
    "view_copy diagonal_copy diag_embed narrow_copy "
    "unbind_copy split_copy select_copy slice_copy squeeze_copy unsqueeze_copy transpose_copy "
    "t_copy alias_copy reflection_pad1d "
    "replication_pad1d split_with_sizes_copy rot90 _reshape_copy _reshape_alias slice_scatter "
    "select_scatter pixel_shuffle"
)
def move(lab: Labels, op: Op) -> None:
    """Data movement: the same op moves the labels; along dims where data picks the
    places they end.
    """
    x = op.args[0]
    results: list[list[Tensor]] = [[] for _ in op.outs]
    picked = picked_dims(lab, op)
    for f in lab.fields(x):
        lost = [d for d in picked if f.size(d) > 1]
        if lost:
            lab.flag("picked", lab.group(f, lost))
            left = [i for i in varying(f) if i not in lost]
            if not left:
                continue
            f = lab.group(f, left)
        if op.name in ("_to_copy", "clone", "contiguous", "lift_fresh_copy", "_conj_physical"):
            moved = [f]
        elif op.name == "constant_pad_nd":
            moved = [op.func(f.expand(x.shape), op.args[1], 0)]
        elif op.name == "_unsafe_view":
            moved = [f.expand(x.shape).reshape(op.outs[0].shape)]
        else:
            moved = [
                m
                for m in tree_leaves(op.func(f.expand(x.shape), *op.args[1:], **op.kwargs))
                if isinstance(m, Tensor)
            ]
        for out, m in zip(results, moved, strict=True):
            out.append(m)
    for t, fields in zip(op.outs, results, strict=True):
        lab.write(t, fields)
        if op.name not in ("_to_copy", "clone", "contiguous"):
            for f in lab.fields(t):
                lab.note(f)


def picked_dims(lab: Labels, op: Op) -> list[int]:
    """Dims of the first operand along which an index that depends on data picks."""
    if op.name in ("index", "_unsafe_index"):
        return [d for d, i in enumerate(op.args[1]) if i is not None and lab.chosen(i)]
    if op.name in ("gather", "index_select") and lab.chosen(op.args[2]):
        return [op.args[1] % op.args[0].dim()]
    return []


@rule(
    "linalg_solve_triangular triangular_solve linalg_solve _linalg_solve_ex linalg_inv_ex "
    "linalg_cholesky_ex"
)
def solve(lab: Labels, op: Op) -> None:
    """Batched linear algebra: the batch dims of A couple with B, the result has B's columns."""
    rank = op.args[0].dim()
    fields = []
    for f in lab.fields(op.args[0]):
        if f.size(-1) > 1 or f.size(-2) > 1:
            lab.flag("opaque", f)
        batch = [i for i in varying(f) if i < rank - 2]
        if batch:
            fields.append(lab.group(reduced(f), batch))
    second = op.args[1] if len(op.args) > 1 and isinstance(op.args[1], Tensor) else None
    lab.write(op.outs[0], lab.merge(fields + (lab.fields(second) if second is not None else [])))
