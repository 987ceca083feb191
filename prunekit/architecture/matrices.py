"""The linear matrices inside the decoder blocks as groups of kind `weights`, whose units are single
elements.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from fnmatch import fnmatch

import torch
from torch import Tensor, nn

from prunekit.architecture.linear import is_linear, weight_of
from prunekit.errors import ConfigError
from prunekit.types import Group, Kept, Member, block_modules, tensor_of

log = logging.getLogger("prunekit")


def block_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the decoder blocks, in order."""
    names = {id(m): name for name, m in model.named_modules()}
    return tuple(names[id(m)] for m in block_modules(model))


def matrices(model: nn.Module, targets: list[str] | None = None) -> list[Group]:
    """One group for each matrix of a linear module in a block, `weights.<block>.<module>`, of the
    shape in which it is stored.

    `targets` narrows them to names or glob patterns (`q_proj`, `mlp.*`). A matrix that several
    modules share appears once. Elsewhere stored matrices (stacked experts) are left alone, and the
    log says how many parameters they hold. Raises ConfigError where nothing is left, naming what
    there is.
    """
    groups, seen, all_names, stacked = [], set(), set(), 0
    for layer, block in enumerate(block_names(model)):
        for name, module in model.get_submodule(block).named_modules():
            if not is_linear(module):
                stacked += sum(p.numel() for p in module.parameters(recurse=False) if p.dim() > 2)
                continue
            all_names.add(name)
            weight: Tensor = module.weight
            if not weight.numel() or id(weight) in seen or not wanted(name, targets):
                continue
            seen.add(id(weight))
            member = Member(f"{block}.{name}.weight", -1, torch.empty(0, 1, dtype=torch.int64))
            groups.append(
                Group(
                    f"weights.{layer}.{name}",
                    "weights",
                    layer,
                    weight.numel(),
                    (member,),
                    shape=tuple(weight.shape),
                )
            )
    if stacked:
        log.warning(
            "%d parameters of the blocks are stacked in tensors of three axes (experts); they are "
            "not pruned",
            stacked,
        )
    if not groups:
        raise ConfigError(
            f"targets={targets} match no linear module of the blocks; there are: "
            f"{', '.join(sorted(all_names)) or 'none'}"
        )
    return groups


def wanted(name: str, targets: list[str] | None) -> bool:
    """Whether a module's name in its block, or the last part of it, is among the targets."""
    return targets is None or any(name.rpartition(".")[2] == t or fnmatch(name, t) for t in targets)


def module_name(group: Group) -> str:
    """The linear module whose matrix the group is."""
    return group.members[0].param.removesuffix(".weight")


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
            weight = tensor_of(model, g.members[0].param)
            weight.masked_fill_(~kept[g.name].to(weight.device), 0)
