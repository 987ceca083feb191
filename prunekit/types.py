"""The nouns that flow between the parts: Member, Group, Pruned, and the aliases Scores, Counts,
Kept, Run.

Shape legend used in docstrings everywhere: N samples, T tokens, C hidden (residual) channels, F ffn
neurons, H query heads, G key/value heads, D head dimension, U units of a group, V vocabulary, L
blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

KINDS = ("neurons", "heads", "hidden", "experts", "blocks", "inner", "weights")
"""What a unit can be. `inner` is any other channel that discovery can prove (MLA ranks, SSM
states), `weights` one matrix element.
"""


STRUCTURES = ("neurons", "heads", "hidden", "experts", "inner")
"""Kinds whose units are slices of several tensors at once."""


@dataclass(frozen=True, eq=False)
class Member:
    """Where the units of a group live in one parameter or buffer.

    Unit `u` owns the slices `index[u]` along `axis` of the tensor that `model.get_parameter(param)`
    (or `get_buffer`) names. Tied tensors appear once, under the first of their names. `index` is
    `(U, width)` int64, ascending in each row. `reads`: the tensor is multiplied with what the units
    computed and summed over this axis (`down_proj`, `o_proj`).
    """

    param: str
    axis: int
    index: Tensor
    reads: bool = False

    @property
    def width(self) -> int:
        """Channels that one unit owns here: 1 for a neuron, D for a kv head, rep * D for its query
        heads.
        """
        return self.index.shape[1]


@dataclass(frozen=True, eq=False)
class Group:
    """Units that compete with each other, e.g. the FFN neurons of one layer, and every place where
    each of them lives.

    Members stand in the order in which the traced forward meets their parameters, so the first one
    is the trigger (`gate_proj`, `q_proj`) and the last one the consumer (`down_proj`, `o_proj`). A
    group of kind `blocks` has no members but `modules`: unit `u` is the whole module `modules[u]`.
    A group of kind `weights` has one member with `axis=-1` and an empty index: its units are the
    elements of the matrix.
    """

    name: str
    kind: str
    layer: int | None
    units: int
    members: tuple[Member, ...] = ()
    modules: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.shape:
            object.__setattr__(self, "shape", (self.units,))

    @property
    def width(self) -> int:
        """Channels per unit in the narrowest member: D for heads, 1 for neurons and residual
        channels.
        """
        return min((m.width for m in self.members), default=1)


Scores = dict[str, Tensor]
"""group name -> float32 tensor of the group's shape, higher = keep."""
Counts = dict[str, int]
"""group name -> how many of its units to remove."""
Kept = dict[str, Tensor]
"""group name -> bool tensor of the group's shape, True = stays. A name left out keeps all its
units.
"""
Run = Callable[..., Iterator[Any]]
"""`run(**kwargs)` pushes the calibration tokens through the model batch by batch and yields the
model's outputs.
"""


@dataclass
class Pruned:
    """What a pruner hands on: the smaller model, what was kept of it, and what is worth showing."""

    model: nn.Module
    kept: Kept
    groups: list[Group]
    scores: Scores = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer called `name`. Raises AttributeError with the name where there is
    none.
    """
    path, _, leaf = name.rpartition(".")
    found = getattr(model.get_submodule(path), leaf)
    if not isinstance(found, torch.Tensor):
        raise AttributeError(f"{name} is {type(found).__name__}, not a tensor")
    return found


def block_modules(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks in order: the `ModuleList` that holds most of the model's parameters,
    outermost first.
    """
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise ValueError(
            f"{type(model).__name__} has no nn.ModuleList: its blocks cannot be told apart"
        )
    found: nn.ModuleList = max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))
    return list(found)
