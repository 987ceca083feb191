"""Bias compensation (FLAP, An et al., AAAI 2024, arXiv 2312.11983, equation 8): removed units keep
their mean output as a bias.

A reader's output is `W x`. Without the channels P it lacks `W_P x_P`, whose mean over the
calibration text is `W_P E[x_P]`: added as a bias, that takes exactly `|W_P E[x_P]|^2` off the mean
squared error of the output.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.activations.moments import moments
from prunekit.architecture.linear import Reader, readers
from prunekit.errors import ConfigError
from prunekit.types import Group, Kept, Run

Biases = dict[str, Tensor]
"""module name -> (out,) float32."""
UNREAD = ("hidden", "experts", "blocks")
"""Kinds of units that no linear module reads in one place."""


@torch.no_grad()
def lost_means(
    model: nn.Module, groups: Iterable[Group], kept: Kept, run: Run, skip: int = 0
) -> Biases:
    """What each reader's output will lack on average once the units go; measured on the model that
    still has them.

    `skip` leaves out that many tokens at the start of each sample. Raises ConfigError for units
    that no linear module reads.
    """
    touched = [
        (g, r)
        for g in groups
        if g.name in kept and not kept[g.name].all()
        for r in _readers(model, g)
    ]
    found = moments(model, dict.fromkeys(r.name for _, r in touched), run, skip)
    lost: Biases = {}
    for g, r in touched:
        if found[r.name].count:  # an expert that no token reached has nothing to make up for
            gone = r.member.index[~kept[g.name].cpu()].flatten().to(r.weight.device)
            means = found[r.name].mean.to(r.weight.device)
            part = r.weight[:, gone].float() @ means[gone]
            lost[r.name] = lost.get(r.name, torch.zeros_like(part)) + part
    return lost


def check_readable(model: nn.Module, groups: Iterable[Group]) -> None:
    """Raises ConfigError naming a group that no linear module reads; shapes are enough to tell."""
    for g in groups:
        _readers(model, g)


def _readers(model: nn.Module, group: Group) -> list[Reader]:
    found = readers(model, group)
    if group.kind in UNREAD or (not found and "/" not in group.name):
        raise ConfigError(
            f"pruner.compensate=bias cannot make up for {group.name}: possible for what a linear "
            "module reads (heads, neurons)"
        )
    return found


@torch.no_grad()
def add_biases(model: nn.Module, lost: Biases) -> None:
    """Add to the bias of each module, in the dtype of its weight; a module without one gets it."""
    for name, values in lost.items():
        module = model.get_submodule(name)
        before: Any = module.bias
        new = values.to(module.weight)  # type: ignore[arg-type]
        set_bias(module, new if before is None else before + new)


@torch.no_grad()
def set_bias(module: nn.Module, values: Tensor) -> None:
    """`values` are the bias of a linear module from now on, in the dtype of its weight."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    if module.bias is None:
        parameter = nn.Parameter(values.to(weight), requires_grad=weight.requires_grad)
        module.register_parameter("bias", parameter)
    else:
        module.bias.copy_(values)  # type: ignore[operator]
