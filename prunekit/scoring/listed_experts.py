"""Experts that are modules of a list, called one after the other by code that need not hand its
routing to anybody: what each puts out, and with what weight that is added.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prunekit.activations.hooks import first_tensor
from prunekit.types import Group

ALIKE = 1e-3
"""How far, of the largest, the derivatives by the channels of one output may be apart."""


class ListedCall(NamedTuple):
    """One expert's tokens: their outputs `f (T, C)` and the router's weights `g (T,)`."""

    expert: int
    f: Tensor
    g: Tensor


def listed_calls(
    model: nn.Module, group: Group, module: nn.Module, args: Any, kwargs: Mapping[str, Any]
) -> list[ListedCall]:
    """Calls `module`, which holds the router and the experts of `group`, again with the same
    arguments. Empty where its output is no sum of its experts' with a weight for each token.

    The derivative of the sum of its output by what an expert puts out is the weight, whatever code
    computes it.
    """
    outputs: dict[int, Tensor] = {}

    def cut(expert: int) -> Any:
        def hook(m: nn.Module, a: Any, out: Any) -> Any:
            if not isinstance(out, Tensor):
                return None
            outputs[expert] = out.detach().requires_grad_()
            return outputs[expert]

        return hook

    hooks = [
        model.get_submodule(path).register_forward_hook(cut(e))
        for e, path in enumerate(group.modules)
    ]
    try:
        with torch.enable_grad():
            total = first_tensor(module.forward(*args, **kwargs)).float().sum()
            if not total.requires_grad or not outputs:
                return []
            slopes = torch.autograd.grad(total, list(outputs.values()), allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for (expert, f), slope in zip(outputs.items(), slopes, strict=True):
        if slope is None or not slope.numel():
            continue
        slope = slope.reshape(-1, slope.shape[-1]).float()
        if float((slope - slope[:, :1]).abs().max()) > ALIKE * float(slope.abs().max()):
            return []
        found.append(ListedCall(expert, f.detach().reshape(slope.shape), slope[:, 0]))
    return found
