"""What a device is quick at, and what a processor is called."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def quick_in_bfloat16(device: str) -> bool:
    """Whether a device of that type (`cpu`, `cuda`) multiplies in bfloat16 at full speed:
    accelerators, and CPUs with instructions for it. Others take ten times as long as in float32.
    """
    if not device.startswith("cpu"):
        return True
    # torch has no public names for these two questions.
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def processor() -> str:
    """The processor's own name, where the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(named), platform.processor() or platform.machine())
