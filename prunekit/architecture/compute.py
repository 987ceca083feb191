"""Forwards in float32 of weights that stay in half precision (`model.compute=float32`): for
processors that crawl in bfloat16, and for sums that half precision would round.

A block's weights are converted when it runs and dropped when it ends, so that this takes the room
of one block in float32 instead of twice the model's. What methods read and write, and what is
saved, are the weights as they were loaded. Gradients pass through the conversion.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prunekit.architecture.blocks import block_modules
from prunekit.errors import ConfigError

HALF = (torch.bfloat16, torch.float16)
SWAPPED = "_prunekit_half_weights"
"""Attribute of a module that runs: whose weights it replaced, by which name, and what they were."""


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
            module.register_forward_pre_hook(_convert)
            # First, so that hooks of others see the weights; whatever ends the forward.
            module.register_forward_hook(_restore, prepend=True, always_call=True)


def compute_as_stored(model: nn.Module) -> None:
    """Take that back."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number in [n for n, hook in hooks.items() if hook in (_convert, _restore)]:
                del hooks[number]
                module._forward_hooks_always_called.pop(number, None)


def computes_in_float32(model: nn.Module) -> bool:
    """Whether `compute_in_float32` was called on the model."""
    return any(_convert in m._forward_pre_hooks.values() for m in model.modules())


def _convert(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    swapped: list[tuple[nn.Module, str, Tensor]] = []
    known: dict[Tensor, Tensor] = {}
    for owner in module.modules():
        for name, weight in owner._parameters.items():
            if weight is not None and weight.dtype in HALF:
                swapped.append((owner, name, weight))
                if weight not in known:
                    known[weight] = weight.float()
                owner._parameters[name] = known[weight]  # type: ignore[assignment]
    module.__dict__[SWAPPED] = swapped
    # Some models cast states to the dtype of a weight that is not converted yet (Mamba's head).
    halves = (isinstance(a, Tensor) and a.dtype in HALF for a in args)
    return tuple(a.float() if half else a for a, half in zip(args, halves, strict=True))


def _restore(module: nn.Module, args: Any, out: Any) -> None:
    for owner, name, weight in module.__dict__.pop(SWAPPED, ()):
        owner._parameters[name] = weight
