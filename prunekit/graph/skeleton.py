"""A small skeleton of a model: one block of each kind represents all of that kind."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.architecture.compute import compute_as_stored
from prunekit.graph.block_lists import block_kinds, block_lists, drop_blocks, modules_in
from prunekit.graph.labels import tensors
from prunekit.graph.model_settings import use_plain_code


def clone(model: nn.Module, tensor: Callable[[Tensor], Tensor]) -> nn.Module:
    """A deep copy whose tensors are `tensor(old)`; what was tied stays tied."""
    memo = {id(t): _alike(tensor(t), t) for _, t in tensors(model)}
    return copy.deepcopy(model, memo)


def _alike(new: Tensor, old: Tensor) -> Tensor:
    if isinstance(old, nn.Parameter) and not isinstance(new, nn.Parameter):
        return nn.Parameter(new, requires_grad=False)
    return new


def lazy_zeros(t: Tensor) -> Tensor:
    """Zeros of the shape and dtype of `t` on the CPU, from pages that the system hands out on the
    first write only.
    """
    return (
        torch.from_numpy(np.zeros(t.numel() * t.element_size(), dtype=np.uint8))
        .view(t.dtype)
        .reshape(t.shape)
    )


def representatives(kinds: Sequence[int], each: int) -> list[int]:
    """For each block the one that represents it: itself for the first `each` of a kind, the first
    for later ones.
    """
    seen: dict[int, int] = defaultdict(int)
    out = []
    for i, kind in enumerate(kinds):
        seen[kind] += 1
        out.append(i if seen[kind] <= each else kind)
    return out


def skeleton(model: nn.Module, each: int = 1) -> tuple[nn.Module, dict[str, list[int]]]:
    """A runnable copy on the CPU with `each` blocks of a kind, and for each block list which of its
    blocks represents each real one.

    Parameters of a CPU model are shared, others are zeros that are never paged in. Buffers (masks,
    rotary tables) are copied, since they decide what is traced; those of a meta model are made
    anew.
    """
    lists = block_lists(model)
    represented = {p: representatives(block_kinds(model, p), each) for p in lists}
    dropped = {
        id(t)
        for p, kinds in represented.items()
        for i, block in enumerate(modules_in(model, p))
        for _, t in tensors(block)
        if i not in set(kinds)
    }

    def copied(t: Tensor) -> Tensor:
        if id(t) in dropped:
            return t
        if isinstance(t, nn.Parameter):
            return t if t.device.type == "cpu" else lazy_zeros(t)
        return lazy_zeros(t) if t.is_meta else t.detach().to("cpu", copy=True)

    small = clone(model, copied).eval()
    compute_as_stored(small)  # a trace would see every weight of a block used when it begins
    renumbered = {}
    for p, kinds in represented.items():
        keep = sorted(set(kinds))
        if len(keep) < len(kinds):
            drop_blocks(small, p, keep)
        renumbered[p] = [keep.index(k) for k in kinds]
    initialise: Any = getattr(small, "_init_weights", None)
    if initialise is not None and any(b.is_meta for b in model.buffers()):
        for module in small.modules():
            if module._buffers:
                initialise(module)
    use_plain_code(small)
    return small, renumbered
