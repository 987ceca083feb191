"""Losses of float16 weights, multiplied for the backward: gradients of the mean over a few thousand
tokens lie below what float16 tells from zero.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

SCALE = 1024.0
"""A power of two, so that nothing is rounded; a gradient of the mean loss may reach 63."""


def loss_scale(model: nn.Module) -> float:
    """1, but for a model with weights in float16."""
    return SCALE if any(p.dtype is torch.float16 for p in model.parameters()) else 1.0


def unscaled(gradient: Tensor, scale: float) -> Tensor:
    """The gradient of a loss that was multiplied by `scale`, in float32 where that is not 1."""
    return gradient if scale == 1 else gradient.float() / scale
