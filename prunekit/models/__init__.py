"""Models: functions that load or build a causal language model and its tokenizer."""

from __future__ import annotations

import torch

from prunekit.architecture.hardware import quick_in_bfloat16


def default_device() -> str:
    """A GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def resolved_dtype(dtype: str, device: str | None) -> str:
    """The name as it is, `fast` aside: bfloat16 where the device is quick at it, else float32."""
    if dtype != "fast":
        return dtype
    return "bfloat16" if quick_in_bfloat16(device or default_device()) else "float32"
