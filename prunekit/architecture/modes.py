"""Modules that do otherwise for a while: in evaluation mode, with another forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode for a while, and each one back in its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, calling the module calls `forward`; afterwards its own one is back."""
    own = module.__dict__.get("forward")  # accelerate's, which moves tensors between devices
    module.forward = forward
    try:
        yield
    finally:
        del module.forward  # the instance's attribute; the class's method shows again
        if own is not None:
            module.forward = own
