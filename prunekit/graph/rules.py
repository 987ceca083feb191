"""What each class of ATen op does to labels. An op without a rule is *opaque*: its labels end there
and units that reach it are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from prunekit.graph.labels import Labels, Op
from prunekit.graph.relations import ranked, varying

CREATES = frozenset(
    "zeros_like ones_like empty_like full_like new_zeros new_ones new_empty new_full rand_like "
    "randn_like randint_like nonzero one_hot bincount "
    "histc unique2 _unique2 unique_dim unique_consecutive multinomial searchsorted bucketize isin "
    "nonzero_static new_empty_strided empty_strided "
    "_local_scalar_dense equal is_nonzero scalar_tensor is_same_size".split()
)
POINTWISE = frozenset(
    "masked_fill where clamp dropout native_dropout gelu silu addcmul addcdiv lerp nan_to_num "
    "bernoulli softplus hardtanh leaky_relu elu mish log_sigmoid_forward threshold relu "
    "logical_not round fmod remainder prelu _prelu_kernel relu6 hardswish polar complex".split()
)
ACTIVATIONS = frozenset(
    (
        "gelu silu relu relu6 leaky_relu elu mish sigmoid tanh hardswish hardsigmoid softplus exp "
        "expm1 erf hardtanh clamp_min"
    ).split()
)
RULES: dict[str, Callable[[Labels, Op], None]] = {}


def rule(names: str) -> Callable[[Callable[[Labels, Op], None]], Callable[[Labels, Op], None]]:
    def decorate(fn: Callable[[Labels, Op], None]) -> Callable[[Labels, Op], None]:
        RULES.update(dict.fromkeys(names.split(), fn))
        return fn

    return decorate


def apply(lab: Labels, op: Op) -> None:
    """Run the op's rule; what has none, or does not fit its rule, is marked opaque."""
    known = RULES.get(op.name)
    pointwise = torch.Tag.pointwise in op.func.tags or op.name in POINTWISE
    if known is None and (
        pointwise or op.mutable and len(op.outs) == 1 and op.outs[0].shape == op.ins[0].shape
    ):
        known = elementwise
    if known is None:
        opaque(lab, op, op.name)
        return
    try:
        known(lab, op)
    except (RuntimeError, IndexError, ValueError, TypeError) as e:
        opaque(lab, op, f"{op.name}: {str(e)[:80]}")


def opaque(lab: Labels, op: Op, why: str) -> None:
    lab.opaque.add(why)
    for t in op.ins:
        for f in lab.fields(t):
            lab.flag("opaque", f)


def elementwise(lab: Labels, op: Op) -> None:
    rank = op.outs[0].dim()
    operands = [t for t in op.ins if op.mutable or t is not op.outs[0]]
    fields = lab.merge([ranked(f, rank) for t in operands for f in lab.fields(t)])
    for t in operands:
        if not lab.fields(t):
            lab.note_constant(t, rank, fields)
    for f in fields if op.name in ACTIVATIONS else ():
        lab.flag("activated", f)
    for t in op.outs:
        lab.write(t, fields)


@rule("copy")
def copy(lab: Labels, op: Op) -> None:
    lab.write(op.args[0], [ranked(f, op.args[0].dim()) for f in lab.fields(op.args[1])])


@rule("fill zero random uniform normal")
def fill(lab: Labels, op: Op) -> None:
    lab.write(op.args[0], [])


@rule("view_as_complex")
def to_complex(lab: Labels, op: Op) -> None:
    fields = [f.expand(*f.shape[:-1], 2) if f.size(-1) == 1 else f for f in lab.fields(op.args[0])]
    for f in fields:
        lab.relate(f[..., 0], f[..., 1])
    lab.write(op.outs[0], [f[..., 0] for f in fields])


@rule("view_as_real")
def to_real(lab: Labels, op: Op) -> None:
    lab.write(op.outs[0], [f.unsqueeze(-1) for f in lab.fields(op.args[0])])


@rule("mm bmm mv dot addmm baddbmm addmv addbmm")
def contraction(lab: Labels, op: Op) -> None:
    """Operands in common coordinates [b, m, k, n]; what varies along k ends there."""
    added = op.name.startswith("add") or op.name == "baddbmm"
    bias, (a, b) = (op.args[0] if added else None), op.args[1:3] if added else op.args[:2]
    vector, scalar = op.name in ("mv", "addmv"), op.name == "dot"

    def left(f: Tensor) -> Tensor:
        f = f[None] if scalar else f
        return (f if f.dim() == 3 else f[None]).unsqueeze(-1)

    def right(f: Tensor) -> Tensor:
        f = f.unsqueeze(-1) if vector or scalar else f
        return (f if f.dim() == 3 else f[None]).unsqueeze(1)

    fields = lab.merge([left(f) for f in lab.fields(a)] + [right(f) for f in lab.fields(b)])
    for t, coordinates in ((a, left), (b, right)):
        lab.note_read(t, [coordinates(f) for f in lab.fields(t)], 2)
        if not lab.fields(t) and t.numel() > 1:
            lab.note_constant(coordinates(t), 4, fields)
    if a.dim() == 3:
        note_batch(lab, fields, 0)
    out = reduce_fields(lab, fields, [2], None, keepdim=False)
    if a.dim() != 3:
        out = [f.squeeze(0) for f in out]
    if vector:
        out = [f.squeeze(-1) for f in out]
    rank = op.outs[0].dim()
    if op.name == "addbmm":
        out = reduce_fields(lab, out, [0], None, keepdim=False)
    if bias is not None:
        labels = lab.fields(bias)
        out = lab.merge(out + [ranked(f, rank) for f in labels])
        if not labels:
            lab.note_constant(bias, rank, out)
    lab.write(op.outs[0], [] if scalar else out)


def note_batch(lab: Labels, fields: Sequence[Tensor], dim: int) -> None:
    """Labels of a batched product's batch dim: heads are what such a dim enumerates."""
    for f in fields:
        if f.size(dim) > 1:
            lab.flag("batch", lab.group(f, [dim]))


@rule(
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_attention_math "
    "_scaled_dot_product_fused_attention_overrideable"
)
def attention(lab: Labels, op: Op) -> None:
    """Coordinates [b, h, m, n, d]."""
    q, k, v = ([f for f in lab.fields(t)] for t in op.args[:3])
    score = reduce_fields(
        lab,
        lab.merge([f.unsqueeze(3) for f in q] + [f.unsqueeze(2) for f in k]),
        [4],
        None,
        keepdim=True,
    )
    mixed = lab.merge(score + [f.unsqueeze(2) for f in v])
    note_batch(lab, mixed, 1)
    mask = op.get(5, "attn_mask") if "cpu" in op.name else op.get(3, "attn_mask")
    if isinstance(mask, Tensor) and not lab.fields(mask):
        lab.note_constant(mask.unsqueeze(-1), 5, mixed)
    lab.write(op.outs[0], reduce_fields(lab, mixed, [3], None, keepdim=False))


def reduce_fields(
    lab: Labels, fields: Sequence[Tensor], dims: Sequence[int], name: str | None, keepdim: bool
) -> list[Tensor]:
    out = []
    for f in fields:
        gone = [d for d in dims if f.size(d) > 1]
        if gone:
            if name:
                lab.flag(name, lab.group(f, gone))
            left = [i for i in varying(f) if i not in gone]
            if not left:
                continue
            f = lab.group(f, left)
        for d in sorted(dims, reverse=True) if not keepdim else ():
            f = f.narrow(d, 0, 1).squeeze(d)
        out.append(f)
    return out


@rule(
    "sum mean amax amin max min var std var_mean norm linalg_vector_norm logsumexp prod any all "
    "argmax argmin nansum count_nonzero median aminmax"
)
def reduction(lab: Labels, op: Op) -> None:
    x = op.args[0]
    dims = reduced_dims(op)
    if dims is None:
        elementwise(lab, op)
        return
    keepdim = op.outs[0].dim() == x.dim()
    flags = {"sum": "sum", "nansum": "sum", "max": "order", "argmax": "order"}
    flag = flags.get(op.name, "statistic")
    fields = reduce_fields(lab, lab.fields(x), dims, flag, keepdim)
    for t in op.outs:
        lab.write(t, [f for f in fields if f.dim() == t.dim()])


def reduced_dims(op: Op) -> list[int] | None:
    """Dims that a reduction, a norm or a softmax runs over; None for the two-operand
    max and min.
    """
    rank = op.args[0].dim()
    if op.name in ("native_layer_norm", "_fused_rms_norm", "rms_norm"):
        return list(range(rank - len(op.args[1]), rank))
    if op.name == "native_group_norm":
        return list(range(1, rank))
    dims = op.get(2 if op.name in ("norm", "linalg_vector_norm", "topk", "kthvalue") else 1, "dim")
    if op.name == "sort" and isinstance(dims, bool):
        dims = op.get(2, "dim")
    if isinstance(dims, Tensor):
        return None
    if op.name in ("topk", "sort", "argsort", "kthvalue") and dims is None:
        dims = -1
    if dims is None or dims == [] or isinstance(dims, bool):
        return list(range(rank))
    return [d % max(rank, 1) for d in ([dims] if isinstance(dims, int) else dims)]


@rule(
    "cumsum cumprod cummax cummin _softmax _log_softmax softmax log_softmax logcumsumexp "
    "_safe_softmax topk sort argsort kthvalue"
)
def along(lab: Labels, op: Op) -> None:
    """Ops whose result at one place depends on the others along a dim; an order statistic also
    mixes the places up.
    """
    dims = reduced_dims(op) or []
    order = op.name in ("topk", "sort", "argsort", "kthvalue")
    flag = "order" if order else "statistic" if "softmax" in op.name else "scan"
    out = []
    for f in lab.fields(op.args[0]):
        hit = [d for d in dims if f.size(d) > 1]
        if hit:
            if op.name == "topk":
                lab.least.append((np.unique(lab.group(f, hit).numpy()), int(op.args[1])))
                lab.picks.append((lab.scope[-1], int(op.args[1]), f.size(hit[0])))
            lab.flag(flag, lab.group(f, hit))
            if order:
                left = [i for i in varying(f) if i not in hit]
                if not left:
                    continue
                f = lab.group(f, left)
        out.append(f)
    for t in op.outs:
        lab.write(t, out)


@rule("native_layer_norm _fused_rms_norm rms_norm native_group_norm")
def norm(lab: Labels, op: Op) -> None:
    x, rank = op.args[0], op.args[0].dim()
    fields = list(lab.fields(x))
    dims = reduced_dims(op) or []
    for f in fields:
        hit = [d for d in dims if f.size(d) > 1]
        if hit:
            lab.flag("statistic", lab.group(f, hit))
    by_group = op.name == "native_group_norm"  # whose channels are dim 1
    for t in op.args[1 if by_group else 2 :]:
        for f in lab.fields(t) if isinstance(t, Tensor) else ():
            f = f.reshape((1, -1) + (1,) * (rank - 2)) if by_group else f
            fields.append(ranked(f, rank))
    lab.write(op.outs[0], lab.merge(fields))
