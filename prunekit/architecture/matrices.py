"""The linear matrices inside the decoder blocks as groups of kind `weights`, whose units are single
elements.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from prunekit.architecture.blocks import block_modules, block_names, linear_names
from prunekit.architecture.linear import weight_of
from prunekit.architecture.mapped import release
from prunekit.types import Counts, Group, Kept, tensor_of

log = logging.getLogger("prunekit")


def matrices(model: nn.Module, targets: list[str] | None = None) -> list[Group]:
    """One group for each matrix of a linear module in a block, `weights.<block>.<module>`, of the
    shape in which it is stored.

    `targets` narrows them as in `blocks.linear_names`. A matrix that several modules share appears
    once. Elsewhere stored matrices (stacked experts) are left alone, and the log says how many
    parameters they hold. Raises ConfigError where nothing is left, naming what there is.
    """
    blocks = block_names(model)
    layers = {block: layer for layer, block in enumerate(blocks)}
    depth = blocks[0].count(".") + 1
    groups, seen = [], set()
    for full in linear_names(model, targets):
        parts = full.split(".")
        layer, name = layers[".".join(parts[:depth])], ".".join(parts[depth:])
        weight = model.get_parameter(f"{full}.weight")
        if id(weight) in seen:
            continue
        seen.add(id(weight))
        groups.append(
            Group(
                f"weights.{layer}.{name}",
                "weights",
                layer,
                weight.numel(),
                shape=tuple(weight.shape),
                matrix=f"{full}.weight",
            )
        )
    if stacked := stacked_parameters(model):
        log.warning(
            "%d parameters of the blocks are stacked in tensors of three axes (experts); they are "
            "not pruned",
            stacked,
        )
    return groups


def stacked_parameters(model: nn.Module) -> int:
    """Parameters of the blocks that are stored in tensors of three axes or more."""
    return sum(p.numel() for b in block_modules(model) for p in b.parameters() if p.dim() > 2)


def shared_parameters(model: nn.Module) -> set[int]:
    """Ids of the parameters that several modules use."""
    users = Counter(id(p) for mod in model.modules() for p in mod.parameters(recurse=False))
    return {key for key, n in users.items() if n > 1}


def module_name(group: Group) -> str:
    """The linear module whose matrix the group is."""
    return group.matrix.removesuffix(".weight")


def matrix(model: nn.Module, group: Group) -> Tensor:
    """(outputs, inputs) view of the group's matrix: writing to it writes to the model."""
    return weight_of(model.get_submodule(module_name(group)))


def to_out_in(model: nn.Module, group: Group, x: Tensor) -> Tensor:
    """`x`, stored like the group's matrix, as (outputs, inputs); the same call turns it back."""
    return x if isinstance(model.get_submodule(module_name(group)), nn.Linear) else x.T


@torch.no_grad()
def zero_elements(model: nn.Module, groups: Iterable[Group], kept: Kept) -> None:
    """Zero what `kept` (stored like the matrices) leaves out."""
    for g in groups:
        if g.name in kept:
            weight = tensor_of(model, g.matrix)
            weight.masked_fill_(~kept[g.name].to(weight.device), 0)


def elements_gone(kept: Kept) -> Counts:
    """Elements that are not kept, by matrix. Masks that lie in files leave memory again."""
    gone = {}
    for name, mask in kept.items():
        gone[name] = mask.numel() - int(mask.sum())
        release([mask])
    return gone
