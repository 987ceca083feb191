"""Matrices with two zeros in every four, in the form that NVIDIA's sparse tensor cores multiply
(compute capability 8.0 and later).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

SHAPES = {torch.float16: (32, 64), torch.bfloat16: (32, 64)}
"""Rows and columns must be multiples of these (both of torch's back ends accept such matrices)."""


def semi_structured(model: nn.Module) -> dict[str, str]:
    """Converts, in place, every linear module whose weights have two zeros in every four inputs to
    `torch.sparse` semi-structured.

    Returns module name -> why it was left alone, for the other linear modules. The weights can be
    used, not trained or saved, afterwards: save first.
    """
    left = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            reason = obstacle(module.weight)
            if reason:
                left[name] = reason
            else:
                module.weight = nn.Parameter(
                    torch.sparse.to_sparse_semi_structured(module.weight.detach()),
                    requires_grad=False,
                )
    return left


def obstacle(weight: Tensor) -> str:
    """Why `weight (outputs, inputs)` cannot be converted; empty if it can."""
    if weight.device.type != "cuda":
        return f"it is on {weight.device.type}: the sparse kernels are CUDA's"
    if torch.version.hip or torch.cuda.get_device_capability(weight.device) < (8, 0):
        return (
            f"{torch.cuda.get_device_name(weight.device)} has no sparse tensor cores (compute "
            "capability 8.0)"
        )
    if weight.dtype not in SHAPES:
        return f"its type is {weight.dtype}; possible: {', '.join(map(str, SHAPES))}"
    rows, columns = SHAPES[weight.dtype]
    if weight.shape[0] % rows or weight.shape[1] % columns:
        return f"its shape {tuple(weight.shape)} is not a multiple of ({rows}, {columns})"
    if not two_of_four(weight):
        return "it does not have two zeros in every four inputs"
    return ""


def two_of_four(weight: Tensor) -> bool:
    """Whether every run of four inputs of `weight (outputs, inputs)` holds two zeros or more."""
    return weight.shape[1] % 4 == 0 and bool(
        weight.view(weight.shape[0], -1, 4).eq(0).sum(-1).ge(2).all()
    )
