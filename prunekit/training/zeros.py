"""Zeros that stay zero while a model is trained.

Masks are `{parameter name: bool tensor of its shape, True = free}`, as `graph.zero_masks` derives
them from what was pruned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn


@torch.no_grad()
def apply_masks(model: nn.Module, keep: Mapping[str, Tensor]) -> None:
    """Sets to zero what the masks do not leave free. Raises ValueError for a mask that fits no
    parameter.
    """
    for name, mask in keep.items():
        parameter = _masked(model, name, mask)
        parameter.masked_fill_(~mask.to(parameter.device), 0)


@contextmanager
def held_at_zero(model: nn.Module, keep: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, what the masks do not leave free is zero, and no gradient reaches it: it is `held`.
    Raises ValueError for a mask that fits no parameter.
    """
    apply_masks(model, keep)
    with held(model, keep):
        yield


@contextmanager
def held(model: nn.Module, keep: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, no gradient reaches what the masks do not leave free.

    An optimizer without momentum from before and without weight decay then leaves it as it is,
    whatever its rule, and neither the norm that gradients are clipped to nor its running means
    count elements that cannot move. Raises ValueError for a mask that fits no parameter.
    """
    hooks = []
    for name, mask in keep.items():
        parameter = _masked(model, name, mask)
        if parameter.requires_grad:
            gone = ~mask.to(parameter.device)
            hook = partial(Tensor.masked_fill, mask=gone, value=0)
            hooks.append(parameter.register_hook(hook))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _masked(model: nn.Module, name: str, mask: Tensor) -> nn.Parameter:
    parameter = model.get_parameter(name)
    if mask.dtype != torch.bool or mask.shape != parameter.shape:
        raise ValueError(
            f"the mask of {name} must be bool {tuple(parameter.shape)}, got {mask.dtype} "
            f"{tuple(mask.shape)}"
        )
    return parameter
