"""What a device is quick at."""

from __future__ import annotations

import torch


def quick_in_bfloat16(device: str) -> bool:
    """Whether a device of that type (`cpu`, `cuda`) multiplies in bfloat16 at full speed:
    accelerators, and CPUs with instructions for it. Others take ten times as long as in float32.
    """
    if not device.startswith("cpu"):
        return True
    # torch has no public names for these two questions.
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
