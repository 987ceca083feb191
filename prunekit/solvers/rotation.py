"""Weights turned into new bases of the residual stream, and the matrices that carry the stream from
one basis to the next (SliceGPT).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.architecture.linear import weight_of
from prunekit.architecture.mapped import beside
from prunekit.architecture.residual import Stream, Sublayer, gain_and_eps
from prunekit.architecture.streaming import cover, streaming, turn
from prunekit.graph.discovery import forget
from prunekit.graph.slicing import update_sizes

Basis = Tensor
"""(C, width) float64 with orthonormal columns."""


def turned(bases: Iterable[Basis]) -> Iterator[Basis]:
    """The same subspaces, each basis turned within its own to lie nearest the one before
    (orthogonal Procrustes).

    `Q_r^T Q_w = U S V^T`; with `Q_w V U^T` in place of `Q_w` the product is `U S U^T`, symmetric
    with eigenvalues in [0, 1].
    """
    previous: Basis | None = None
    for Q in bases:
        if previous is not None:
            U, _, Vh = torch.linalg.svd(previous.T.to(Q.device) @ Q)
            Q = Q @ Vh.T @ U.T
        yield Q
        previous = Q


def shortcut(Q_r: Basis, Q_w: Basis) -> Tensor:
    """(width, r) `B` with `Q_r^T Q_w = I - B B^T` for turned bases; r is at most the number of
    dropped directions.
    """
    values, U = torch.linalg.eigh(
        torch.eye(Q_r.shape[1], dtype=Q_r.dtype, device=Q_r.device) - Q_r.T @ Q_w.to(Q_r.device)
    )
    used = values > 1e-6  # one in a million of a direction's size: below what float32 keeps
    found: Tensor = U[:, used] * values[used].sqrt()
    return found


def tied(model: nn.Module, chain: Stream) -> bool:
    """Whether the output matrix is the embedding's."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return head is not None and head.weight is model.get_submodule(chain.embedding).weight


@torch.no_grad()
def assemble(model: nn.Module, chain: Stream, bases: Sequence[Basis], depth: int) -> None:
    """Slice the first `depth` blocks in place: rotated weights, unit gains, and the maps between
    bases.

    The stream is narrowed by the embedding itself, or, where that is tied to the output matrix, on
    entering the first block; it has its full width again on entering block `depth` or the last
    norm. `bases` are of the stream before each sub-layer and after the last one; where the one
    after it is missing, the last sub-layer writes at full width.
    """
    parts = [part for block in chain.sublayers[:depth] for part in block]
    around = iter(zip(bases, [*bases[1:], None]))
    for name, row in zip(chain.blocks, chain.sublayers[:depth]):
        with turn(model.get_submodule(name)):
            for part in row:
                slice_sublayer(model, part, *next(around))
    if tied(model, chain):
        _rotate(model, chain.blocks[0], bases[0])
    else:
        embedding = model.get_submodule(chain.embedding)
        words: Tensor = embedding.weight  # type: ignore[assignment]
        put(embedding, words.double() @ bases[0].to(words.device))
    if len(bases) > len(parts):
        _rotate(model, (*chain.blocks, chain.norm)[depth], bases[-1].T)
    else:
        _write_late(model, parts[-1].module, bases[-1].T, chain.norm)
    forget(model)


def slice_sublayer(model: nn.Module, part: Sublayer, Q_r: Basis, Q_w: Basis | None) -> None:
    """A sub-layer reads in the basis `Q_r` and writes in `Q_w`, or as before where that is None."""
    place = weight_of(model.get_submodule(part.readers[0])).device
    slice_readers(model, part, Q_r.to(place))
    if Q_w is None:
        return
    slice_writers(model, part, Q_w.to(place))
    B = shortcut(Q_r.to(place), Q_w)
    if B.shape[1]:
        _rotate(model, part.module, B, part.norm)


def _rotate(model: nn.Module, path: str, weight: Tensor, source: str = "") -> None:
    """Give the module at `path` a rotation of its input, or with `source` of its output."""
    from prunekit.checkpoint.remote_code.stream_modules import Rotation

    _insert(model, f"{path}.rotation", Rotation(len(weight), weight.shape[1], source), weight)


def _write_late(model: nn.Module, path: str, weight: Tensor, target: str) -> None:
    """What the module at `path` writes joins the stream on entering `target`, at full width."""
    from prunekit.checkpoint.remote_code.stream_modules import LateSum

    _insert(model, f"{path}.late_sum", LateSum(len(weight), weight.shape[1], target), weight)


def _insert(model: nn.Module, path: str, module: Any, weight: Tensor) -> None:
    from prunekit.checkpoint.remote_code.runtime_modules import insert

    like = next(model.get_submodule(path.rpartition(".")[0]).parameters())
    module = module.to(like.device, like.dtype)
    module.weight.copy_(weight)
    module.weight.data = beside(module.weight.data, like)
    insert(model, path, module.requires_grad_(like.requires_grad))
    cover(model, streaming(model))


def slice_readers(model: nn.Module, part: Sublayer, Q_r: Basis) -> None:
    """Readers take the basis `Q_r` and the gain of the norm, which keeps dividing by the full
    width.
    """
    norm = model.get_submodule(part.norm)
    gain, offset, eps_name, eps = gain_and_eps(norm)
    full, width = Q_r.shape
    for name in part.readers:
        module = model.get_submodule(name)
        put_linear(module, (weight_of(module).double() * gain.double()) @ Q_r.to(gain.device))
    # x / sqrt(sum x^2 / full + eps) = x sqrt(full / width) / sqrt(sum x^2 / width + eps full /
    # width)
    put(norm, torch.full((width,), math.sqrt(full / width) - offset))
    setattr(norm, eps_name, eps * full / width)


def slice_writers(model: nn.Module, part: Sublayer, Q_w: Basis) -> None:
    """Writers take the basis `Q_w`."""
    for name in part.writers:
        module = model.get_submodule(name)
        W = weight_of(module).double()
        put_linear(module, Q_w.T.to(W.device) @ W)
        bias = module._parameters.get("bias")
        if bias is not None:
            turned_bias = (Q_w.T.to(bias.device) @ bias.double()).to(bias.dtype)
            module.bias = nn.Parameter(turned_bias, bias.requires_grad)


def put_linear(module: nn.Module, W: Tensor) -> None:
    """`W (out, in)` as the module stores it."""
    put(module, W if isinstance(module, nn.Linear) else W.T)


def put(module: nn.Module, weight: Tensor) -> None:
    """A new weight in the old one's dtype and on its device; the module's sizes follow."""
    old: Tensor = module.weight  # type: ignore[assignment]
    new = beside(weight.to(old).contiguous(), old)
    module.weight = nn.Parameter(new, requires_grad=old.requires_grad)
    update_sizes(module, "weight", old.shape)


def removed(model: nn.Module, chain: Stream, depth: int, width: int, late: bool) -> int:
    """Parameters that slicing the first `depth` blocks to `width` takes away, less the matrices
    that it adds; `late`: the last sub-layer writes at full width.
    """
    vocabulary, full = model.get_submodule(chain.embedding).weight.shape  # type: ignore[misc]
    less = full - width
    gone = -full * width if tied(model, chain) else vocabulary * less
    parts = [part for block in chain.sublayers[:depth] for part in block]
    for part in parts:
        whole = late and part is parts[-1]
        writers = [] if whole else [model.get_submodule(n) for n in part.writers]
        modules = [*writers, *(model.get_submodule(n) for n in part.readers)]
        channels = sum(weight_of(m).numel() // full for m in modules)
        biases = sum(m.bias is not None for m in writers)
        gone += less * (channels + biases + 1) - (0 if whole else width * min(width, less))
    return gone - full * width
