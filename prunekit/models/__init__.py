"""Models: functions that load or build a causal language model and its tokenizer."""

from __future__ import annotations

import os

import torch

from prunekit.architecture.hardware import quick_in_bfloat16


def default_device() -> str:
    """A GPU where there is one: under torchrun or accelerate launch that of this process."""
    if not torch.cuda.is_available():
        return "cpu"
    own = os.environ.get("LOCAL_RANK")
    return "cuda" if own is None else f"cuda:{int(own) % torch.cuda.device_count()}"


def resolved_dtype(dtype: str, device: str | None) -> str:
    """The name as it is, `fast` aside: bfloat16 where the device is quick at it, else float32."""
    if dtype != "fast":
        return dtype
    return "bfloat16" if quick_in_bfloat16(device or default_device()) else "float32"
