"""Memory that a model takes once loaded, and at the peak of a forward pass."""

from __future__ import annotations

import ctypes
import gc
import sys
from itertools import chain
from typing import Any

import torch
from torch import nn

from prunekit.architecture.modes import eval_mode
from prunekit.architecture.streaming import device_of
from prunekit.profiling import Peak
from prunekit.registry import Positive, evals


@evals.register(cached=False, context=("tokens",))
def memory(
    model: nn.Module, tokenizer: Any, *, batch: Positive = 1, tokens: Positive = 128
) -> dict[str, float]:
    """MiB of the loaded model, and of the peak while it reads `batch` x `tokens` ids (no gradients,
    no cache).

    `loaded_memory_mib` is parameters and buffers, each storage once (LLM-Pruner's Memory column,
    which has no peak in it). `peak_memory_mib` is that plus what the forward pass added: on CUDA
    the allocator's own count, exact and the same every time; on the CPU the growth of the process's
    resident memory, after giving freed memory back to the system, so it carries the noise of malloc
    (a few MiB) and the first call's set-up is kept out by one small forward pass before it.
    """
    device = device_of(model)
    ids = torch.ones(batch, tokens, dtype=torch.long, device=device)
    with eval_mode(model), torch.no_grad():
        model(input_ids=ids[:1, :8], use_cache=False)
        _give_back()
        with Peak(cuda=device.type == "cuda") as peak:
            model(input_ids=ids, use_cache=False)
    loaded = loaded_mib(model)
    return {
        "loaded_memory_mib": loaded,
        "peak_memory_mib": loaded + max(0.0, peak.mib - peak.start_mib),
    }


def loaded_mib(model: nn.Module) -> float:
    """MiB of parameters and buffers; tensors that share a storage count once."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in chain(model.parameters(), model.buffers())
    }
    return sum(storages.values()) / 2**20


def _give_back() -> None:
    """Return memory that is free but held by the allocators, so that the growth that follows is
    seen.
    """
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; musl has none
        if trim is not None:
            trim(0)
