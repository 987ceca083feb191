"""Models: functions that load or build a causal language model and its tokenizer."""

from __future__ import annotations

import torch


def default_device() -> str:
    """A GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def resolved_dtype(dtype: str, device: str | None) -> str:
    """The name as it is, `fast` aside: bfloat16 on an accelerator, and on CPUs with instructions
    for it, float32 on others, which take ten times as long in bfloat16.
    """
    if dtype != "fast":
        return dtype
    # torch has no public names for these two questions.
    has_it = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    on_cpu = (device or default_device()).startswith("cpu")
    return "float32" if on_cpu and not has_it else "bfloat16"
