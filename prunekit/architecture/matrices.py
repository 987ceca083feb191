"""The linear matrices inside the decoder blocks as groups of kind `weights`, whose units are single
elements, and their input norms.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from fnmatch import fnmatch

import torch
from torch import Tensor, nn

from prunekit.activations.moments import Moments, moments
from prunekit.architecture.linear import is_linear, weight_of
from prunekit.errors import ConfigError
from prunekit.selection.elements import Pattern
from prunekit.types import Counts, Group, Kept, Member, Run, block_modules, tensor_of

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
            weight: Tensor = module.weight  # type: ignore[assignment]
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


def upright(model: nn.Module, group: Group, x: Tensor) -> Tensor:
    """`x`, stored like the group's matrix, as (outputs, inputs); the same call turns it back."""
    return x if isinstance(model.get_submodule(module_name(group)), nn.Linear) else x.T


def fits(model: nn.Module, groups: Iterable[Group], counts: Counts, asked: Pattern | None) -> None:
    """Raises ConfigError before any work where a pattern does not divide a matrix, or is not what
    the ratio asks for.
    """
    for g in groups if asked else ():
        inputs = matrix(model, g).shape[1]
        if asked and counts.get(g.name):
            if inputs % asked.block_m:
                raise ConfigError(
                    f"{g.name} has {inputs} inputs, which pruner.block_m={asked.block_m} does not "
                    "divide: narrow pruner.targets"
                )
            asked.kept_of(counts[g.name], g.units, g.name)


@torch.no_grad()
def zero_elements(model: nn.Module, groups: Iterable[Group], kept: Kept) -> None:
    """Zero what `kept` (stored like the matrices) leaves out."""
    for g in groups:
        if g.name in kept:
            weight = tensor_of(model, g.members[0].param)
            weight.masked_fill_(~kept[g.name].to(weight.device), 0)


@torch.no_grad()
def input_norms(model: nn.Module, groups: Iterable[Group], run: Run) -> dict[str, Tensor]:
    """Group name -> (inputs,) `||X_j||_2` over all calibration tokens that enter the module; zero
    where none does (an idle expert).
    """
    groups = list(groups)
    found = moments(model, dict.fromkeys(module_name(g) for g in groups), run)
    return {g.name: _norm(found[module_name(g)], matrix(model, g)) for g in groups}


def _norm(m: Moments, weight: Tensor) -> Tensor:
    return (
        (m.square * m.count).sqrt()
        if m.count
        else torch.zeros(weight.shape[1], device=weight.device)
    )


def wanda_score(weight: Tensor, norms: Tensor) -> Tensor:
    """`|W_ij| * ||X_j||_2` for `weight (outputs, inputs)` and `norms (inputs)`."""
    return weight.float().abs() * norms.to(weight.device)
