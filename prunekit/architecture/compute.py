"""Forwards in float32 of weights that stay in half precision (`model.compute=float32`): for
processors that crawl in bfloat16, and for sums that half precision would round.

A block's weights are converted when it runs and dropped when it ends, so that this takes the room
of one block in float32 instead of twice the model's. What methods read and write, and what is
saved, are the weights as they were loaded. Gradients pass through the conversion.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.architecture.blocks import block_modules
from prunekit.errors import ConfigError

HALF = (torch.bfloat16, torch.float16)


def compute_in_float32(model: nn.Module) -> None:
    """From now on every block, and every module outside the blocks, runs in float32.

    Raises ConfigError where no weight is of half precision.
    """
    if not any(p.dtype in HALF for p in model.parameters()):
        raise ConfigError("model.compute=float32: no weight is bfloat16 or float16; give null")
    blocks = set(block_modules(model))
    # Parts of a block too: some methods run them alone. Whatever holds blocks would take them all.
    for module in model.modules():
        if module in blocks or blocks.isdisjoint(module.modules()):
            # Not by hooks: a backward that recomputes a block calls its forward alone.
            module.forward = partial(_forward, module)


def compute_as_stored(model: nn.Module) -> None:
    """Take that back."""
    for module in model.modules():
        if _is_converted(module):
            del module.forward


def computes_in_float32(model: nn.Module) -> bool:
    """Whether `compute_in_float32` was called on the model."""
    return any(map(_is_converted, model.modules()))


def _is_converted(module: nn.Module) -> bool:
    return getattr(module.__dict__.get("forward"), "func", None) is _forward


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The module's own forward, with its weights and arguments in float32."""
    halves = [
        (owner, name, weight)
        for owner in module.modules()
        for name, weight in owner._parameters.items()
        if weight is not None and weight.dtype in HALF
    ]
    try:
        wide = {weight: weight.float() for _, _, weight in halves}
        for owner, name, weight in halves:
            owner._parameters[name] = wide[weight]  # type: ignore[assignment]
        # Some models cast states to the dtype of a weight that is not converted yet (Mamba's head).
        states = [a.float() if isinstance(a, Tensor) and a.dtype in HALF else a for a in args]
        return type(module).forward(module, *states, **kwargs)
    finally:
        for owner, name, weight in halves:
            owner._parameters[name] = weight
