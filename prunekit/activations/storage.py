"""Where activations wait between two blocks, and in what precision they are made."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from prunekit.architecture.hardware import quick_in_bfloat16
from prunekit.architecture.mapped import release, reserve

Store = Literal["memory", "bfloat16", "disk"]
"""Where activations between two blocks wait: as they are, in bfloat16 in host memory, or in a file
that the system maps into memory.
"""
Precision = Literal["model", "bf16", "fast"]
"""Of the forwards: the model's own, matrix products in bfloat16, or these where the device is quick
at them.
"""


def resolved(precision: Precision, device: torch.device) -> Precision:
    """`fast` is `bf16` where the device has instructions for it, else the model's own."""
    if precision != "fast":
        return precision
    return "bf16" if quick_in_bfloat16(device.type) else "model"


class PassOptions(NamedTuple):
    """How tokens go through the blocks.

    Attributes:
        store: where activations wait between blocks.
        precision: of the forwards.
        batch: samples a forward; None takes as many as make up 4,096 tokens.
    """

    store: Store = "memory"
    precision: Precision = "model"
    batch: int | None = None


def autocast(precision: Precision, device: torch.device) -> Any:
    """A context in which matrix products of a forward run in bfloat16, or as the model has them."""
    if resolved(precision, device) != "bf16":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


class Activations:
    """The hidden state `(N, T, C)` between two blocks, read and written by batch."""

    def __init__(self, samples: int, like: Tensor, store: Store):
        shape = (samples, *like.shape[1:])
        self._dtype, self._device, self._store = like.dtype, like.device, store
        kept = torch.bfloat16 if store == "bfloat16" else like.dtype
        if store == "disk":
            self._folder = tempfile.TemporaryDirectory(prefix="prunekit-")  # goes with this object
            file = str(Path(self._folder.name) / "activations")
            count = torch.Size(shape).numel()
            with open(file, "wb") as whole:
                reserve(whole.fileno(), count * kept.itemsize)
            self._data = torch.from_file(file, shared=True, size=count, dtype=kept).view(shape)
        else:
            away = store == "bfloat16"
            # Pinned memory reaches a GPU while the host goes on.
            self._data = torch.empty(
                shape,
                dtype=kept,
                device="cpu" if away else like.device,
                pin_memory=away and like.is_cuda,
            )

    def clone(self) -> Activations:
        """A copy of its own, kept in the same way."""
        other = Activations(len(self._data), self[slice(0, 1)], self._store)
        other._data.copy_(self._data)
        return other

    def release(self) -> None:
        """Take what lies in a file out of memory; it stays in the file."""
        release([self._data])

    def __getitem__(self, rows: slice) -> Tensor:
        # Converted where it is read: half as much goes over the bus.
        return self._data[rows].to(self._device, copy=True, non_blocking=True).to(self._dtype)

    def __setitem__(self, rows: slice, x: Tensor) -> None:
        self._data[rows] = x.to(self._data)
