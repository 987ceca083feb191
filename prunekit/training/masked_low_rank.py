"""Low-rank updates that leave zeros zero (PERP, Zimmer et al., arXiv 2312.15230, section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

Form = Literal["mask", "scale"]


class MaskedUpdates(NamedTuple):
    """Updates of rank `r` of the linear layers of these names.

    form: `mask` is `W + alpha / r M * (B A)` with the mask `M` of the weights (MaskLoRA), `scale`
        is `W * (B A)` (ScaleLoRA).
    """

    names: Sequence[str]
    form: Form
    r: int
    alpha: int


class MaskLowRank(nn.Module):
    """`W + scaling M * (B A)`, which is `W` at the start.

    mask: `M`, stored as the weight is; None is all ones.
    """

    mask: Tensor | None

    def __init__(self, weight: Tensor, r: int, scaling: float, mask: Tensor | None):
        super().__init__()
        rows, columns = weight.shape
        self.A = nn.Parameter(weight.new_empty(r, columns))
        self.B = nn.Parameter(weight.new_zeros(rows, r))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.scaling = scaling
        moved = None if mask is None else mask.to(weight.device)
        self.register_buffer("mask", moved, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        update = self.scaling * (self.B @ self.A)
        return weight + (update if self.mask is None else update.masked_fill(~self.mask, 0))


class ScaleLowRank(nn.Module):
    """`W * (B A)`, which is `W` at the start: the first component of `B A` is all ones.

    The authors start all components alike, at `1 / sqrt(r)`: their gradients are then alike for
    ever, and the rank stays one. Here the others start as those of LoRA do.
    """

    def __init__(self, weight: Tensor, r: int):
        super().__init__()
        rows, columns = weight.shape
        self.A = nn.Parameter(weight.new_ones(r, columns))
        self.B = nn.Parameter(weight.new_zeros(rows, r))
        with torch.no_grad():
            nn.init.normal_(self.A[1:], std=1 / math.sqrt(columns))
            self.B[:, 0] = 1

    def forward(self, weight: Tensor) -> Tensor:
        return weight * (self.B @ self.A)


@contextmanager
def masked_updates(
    model: nn.Module, updates: MaskedUpdates | None, keep: Mapping[str, Tensor]
) -> Iterator[None]:
    """Inside, the layers' weights are frozen and their updates require gradients; afterwards these
    are part of the weights, which require gradients as before. Nothing happens without updates.

    keep: masks of the weights, stored as the weights are.
    """
    if updates is None:
        yield
        return
    before: list[tuple[nn.Module, bool, list[str]]] = []
    for name in updates.names:
        module, weight = model.get_submodule(name), model.get_parameter(f"{name}.weight")
        before.append((module, weight.requires_grad, list(module._parameters)))
        weight.requires_grad_(False)
        update: nn.Module
        if updates.form == "scale":
            update = ScaleLowRank(weight, updates.r)
        else:
            mask = keep.get(f"{name}.weight")
            update = MaskLowRank(weight, updates.r, updates.alpha / updates.r, mask)
        parametrize.register_parametrization(module, "weight", update)
    try:
        yield
    finally:
        for module, flag, order in before:
            parametrize.remove_parametrizations(module, "weight")
            module.get_parameter("weight").requires_grad_(flag)
            for leaf in order:  # the weight comes back behind the bias
                module._parameters[leaf] = module._parameters.pop(leaf)
