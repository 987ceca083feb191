"""Weights in files that the system maps into memory: a model larger than memory is pruned in place,
block by block, by the very code that prunes one in memory.

Every tensor has a file of its own, without a name: its room on the disk comes back with the tensor,
and a process that is killed leaves nothing. Pages that were used stay resident until they are
released: blocks release theirs after each forward.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import ConfigError

RESTS = "_rests"
"""Attribute of a parameter that is at work elsewhere: where it rests (see `streaming`)."""


def check_mappable() -> None:
    """Raises ConfigError where the system cannot take mapped pages out of memory again."""
    if _madvise() is None:
        raise ConfigError("model.weights=disk needs madvise, which this system lacks")


def mapped_copy(value: Tensor) -> Tensor:
    """`value` in a file under the folder for temporary files (TMPDIR), in its shape and dtype.
    Raises OSError where the disk is full.
    """
    size = max(1, value.numel()) * value.element_size()
    handle, name = tempfile.mkstemp(prefix="prunekit-")
    try:
        reserve(handle, size)
        storage = torch.UntypedStorage.from_file(name, True, size)
    finally:
        os.close(handle)
        os.unlink(name)
    found: Tensor = empty_in(storage, value)
    found.copy_(value.detach())
    release([found])
    return found


def reserve(handle: int, size: int) -> None:
    """Bytes of the disk for a file that will be mapped: one that finds the disk full later ends the
    process without a word. Raises OSError where it is full.
    """
    if hasattr(os, "posix_fallocate"):  # macOS has none
        os.posix_fallocate(handle, 0, size)


def empty_in(storage: Any, like: Tensor) -> Any:
    """A tensor of the shape and dtype of `like` in a storage."""
    found: Any = torch.empty(0, dtype=like.dtype)
    return found.set_(storage, 0, like.shape)


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor lies in a file."""
    return tensor.device.type == "cpu" and tensor.untyped_storage().filename is not None


def mapped(model: nn.Module) -> bool:
    """Whether weights of the model lie in files."""
    return any(is_mapped(p) for p in model.parameters())


def beside(new: Tensor, old: Tensor) -> Tensor:
    """`new`, in a file where `old`, whose place it takes, is in one; where `old` is at work on a
    device, what goes there with it stays there.
    """
    owner = old if old._base is None else old._base
    place = getattr(owner, RESTS, old)
    if new.device.type != "cpu" or not is_mapped(place) or is_mapped(new):
        return new
    release([place])
    return mapped_copy(new)


def release(tensors: Iterable[Tensor]) -> None:
    """Take the pages of those that lie in files out of this process; what they hold stays. The
    system writes it to the disk when it needs the room.
    """
    advise = _madvise()
    for tensor in tensors:
        if advise is not None and is_mapped(tensor):
            storage = tensor.untyped_storage()
            advise(
                ctypes.c_void_p(storage.data_ptr()),
                ctypes.c_size_t(storage.nbytes()),
                mmap.MADV_DONTNEED,
            )


@cache
def _madvise() -> Any:
    if os.name != "posix" or not hasattr(mmap, "MADV_DONTNEED"):
        return None
    return ctypes.CDLL(None, use_errno=True).madvise
