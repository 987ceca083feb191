"""Several decoder blocks as one (LaCo, Yang et al., EMNLP 2024 Findings, arXiv 2402.11187): the
matrices of the blocks that go, added to those of the block that stays.

Whoever merges then removes the merged blocks by `remove`; a `Merge` is all that is needed to do it
again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypedDict, get_args

import torch
from torch import Tensor, nn

from prunekit.architecture.linear import is_linear
from prunekit.errors import ConfigError
from prunekit.graph.masks import bypass

Rule = Literal["differences", "last"]
"""What becomes of a parameter: its own value and the sum of the others' differences from it (the
paper's equation 1), or the last one's value (what the paper's code comes to).
"""
Values = dict[str, Tensor]
"""Parameter -> the value that merging gives it."""


class Merge(TypedDict):
    """`blocks` become part of the block `into`; all are names in the model before removal."""

    into: str
    blocks: list[str]
    rule: Rule


def merged_parameters(block: nn.Module) -> list[str]:
    """Names, inside the block, of what is merged: tensors of two axes or more, and the biases of
    linear modules. Norms stay those of the block that stays.
    """
    biases = {
        f"{name}.bias" if name else "bias"
        for name, module in block.named_modules()
        if is_linear(module)
    }
    return [n for n, p in block.named_parameters() if p.dim() > 1 or n in biases]


def check_mergeable(model: nn.Module, blocks: Sequence[str]) -> None:
    """Raises ConfigError where blocks differ in what would be merged, or share it."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    owner: dict[int, str] = {}
    for name in blocks:
        block = model.get_submodule(name)
        shapes[name] = {n: tuple(block.get_parameter(n).shape) for n in merged_parameters(block)}
        for n in shapes[name]:
            first = owner.setdefault(id(block.get_parameter(n)), name)
            if first != name:
                raise ConfigError(f"{first} and {name} share parameters: they cannot be merged")
        if shapes[name] != shapes[blocks[0]]:
            raise ConfigError(
                f"{name} is not built like {blocks[0]}: only blocks whose matrices have the same "
                "names and shapes can be merged"
            )


@torch.no_grad()
def merged_values(model: nn.Module, merge: Merge, before: Mapping[str, Tensor]) -> Values:
    """What the parameters of `merge["into"]` become; `before` has the values of parameters that
    earlier merges changed, the model those of all others.
    """

    def value(block: str, name: str) -> Tensor:
        full = f"{block}.{name}"
        return before[full] if full in before else model.get_parameter(full)

    found = {}
    for name in merged_parameters(model.get_submodule(merge["into"])):
        own = value(merge["into"], name)
        if merge["rule"] == "last":
            new = value(merge["blocks"][-1], name).to(own.device, copy=True)
        else:
            total = own.double()
            for block in merge["blocks"]:
                total = total + (value(block, name).to(own.device).double() - own.double())
            new = total.to(own.dtype)
        found[f"{merge['into']}.{name}"] = new
    return found


@contextmanager
def with_merges(model: nn.Module, values: Values, gone: Sequence[str]) -> Iterator[None]:
    """Inside, parameters have these values and the blocks `gone` hand on their input; afterwards
    the model is as it was.
    """
    old = {name: model.get_parameter(name).data for name in values}
    hooks = [bypass(model.get_submodule(name)) for name in gone]
    try:
        for name, value in values.items():
            model.get_parameter(name).data = value
        yield
    finally:
        for name, value in old.items():
            model.get_parameter(name).data = value
        for hook in hooks:
            hook.remove()


def checked_merges(merges: Any, where: str) -> list[Merge]:
    """Merges as read from the file `where`. Raises ConfigError for what is none."""
    found: list[Merge] = []
    for entry in merges if isinstance(merges, list) else [merges]:
        fields = entry if isinstance(entry, dict) else {}
        blocks: Any = fields.get("blocks")
        rule: Any = fields.get("rule")
        named = isinstance(blocks, list) and blocks and all(isinstance(b, str) for b in blocks)
        if not named or not isinstance(fields.get("into"), str) or rule not in get_args(Rule):
            raise ConfigError(
                f"{where}: merges must be a list of into, blocks and rule "
                f"({', '.join(get_args(Rule))}), found {entry!r}"
            )
        found.append(Merge(into=fields["into"], blocks=blocks, rule=rule))
    return found


@torch.no_grad()
def merge_blocks(model: nn.Module, merges: Sequence[Merge]) -> None:
    """Give the blocks that stay their merged parameters, merge after merge, in place; the others
    remain, to be removed. Raises ConfigError for a block that the model lacks or cannot merge.
    """
    have = {name for name, _ in model.named_modules()}
    for merge in merges:
        names = [merge["into"], *merge["blocks"]]
        if missing := [name for name in names if name not in have]:
            raise ConfigError(f"merges: the model has no block {missing[0]!r}")
        check_mergeable(model, names)
        for name, value in merged_values(model, merge, {}).items():
            model.get_parameter(name).copy_(value)
