"""The nouns that flow between the parts: Member, Group, Pruned, and the aliases Scores, Counts,
Kept, Run.

Shape legend used in docstrings everywhere: N samples, T tokens, C hidden (residual) channels, F ffn
neurons, H query heads, G key/value heads, D head dimension, U units of a group, V vocabulary, L
blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

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
    index: Tensor = field(repr=False)
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
    A group of kind `weights` has neither: its units are the elements of the parameter that `matrix`
    names. `whole`: the group that this one is a part of (see `parts`).
    """

    name: str
    kind: str
    layer: int | None
    units: int
    members: tuple[Member, ...] = ()
    modules: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()
    matrix: str = ""
    whole: str = ""

    def __post_init__(self) -> None:
        if not self.shape:
            object.__setattr__(self, "shape", (self.units,))

    @property
    def width(self) -> int:
        """Channels per unit in the narrowest member: D for heads, 1 for neurons and residual
        channels.
        """
        return min((m.width for m in self.members), default=1)

    @property
    def parts(self) -> tuple[Group, ...]:
        """Every member as a group of its own: for structures chosen without regard to what depends
        on them.
        """
        return tuple(
            replace(self, name=f"{self.name}/{m.param}:{m.axis}", members=(m,), whole=self.name)
            for m in self.members
        )


Scores = dict[str, Tensor]
"""group name -> float32 tensor of the group's shape, higher = keep."""
Counts = dict[str, int]
"""group name -> how many of its units to remove."""
Kept = dict[str, Tensor]
"""group name -> bool tensor of the group's shape, True = stays. A name left out keeps all."""
Of = Literal["units", "prunable", "model"]
"""Of what a share is: of the units of each group, of the parameters that may go, of all."""
Budget = Literal["units", "parameters"]
"""In what a total is counted."""
Cut = Literal["within", "nearest"]
"""Where a pooled ranking is cut: at the last unit within the total, or where what stays comes
nearest to it (FLAP).
"""
Ranking = Literal["local", "kind", "global"]
"""Which units compete: those of one group, of all groups of a kind, of all groups."""


@dataclass(frozen=True)
class Allocation:
    """How much goes from where: what a ratio answers.

    Attributes:
        counts: units to remove by group.
        ranking: `local` keeps these numbers; `kind` and `global` let groups exchange units, the
            total staying what the counts come to; `rows` keeps the numbers of single rows of
            matrices.
        budget: in what that total is counted.
        cut: where a `global` ranking is cut.
        rows: with `rows`, (outputs,) elements to remove of each row, by group; they add up to
            counts.
        notes: what is worth showing of how it was found.
        measure: what a model takes of the budget that was kept, for a pruner to tell.
        kept: with `rows`, the masks that a pruner would choose block by block, where known.
    """

    counts: Counts
    ranking: Ranking | Literal["rows"] = "local"
    budget: Budget = "units"
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    cut: Cut = "within"
    measure: Callable[[nn.Module], float] | None = None
    kept: Kept = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Whether nothing is to go."""
        return not any(self.counts.values())


class Progress(Protocol):
    """Where a training, or a pass by blocks, keeps how far it is, so that the same command goes on
    from there.
    """

    def read(self) -> dict[str, Tensor] | None:
        """What was written last; None where nothing was, or it is damaged."""

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Put `tensors` in the place of what was written before, whole or not at all."""

    def drop(self) -> None:
        """Forget what was written."""


class Run(Protocol):
    """The calibration text on its way through a model, or through one of its blocks."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def tokens(self) -> Tensor:
        """(N, T) int64."""
        ...

    @property
    def counts(self) -> Counts:
        """Units about to go, for criteria registered with `uses_counts=True`."""
        ...

    @property
    def statistics(self) -> dict[Any, Any]:
        """Statistics taken on this run, for a second reader of the same ones."""
        ...

    def part(self, number: int, of: int) -> Run:
        """The same run over one of `of` parts of the samples, for one of as many processes."""
        ...

    def forward(self) -> Iterator[int]:
        """Pushes all tokens through, batch by batch, for the sake of hooks; yields the number of
        samples that each batch held.
        """
        ...

    def losses(self, batch: int | None = None) -> Iterator[Any]:
        """Outputs with `.loss`, the mean over the batch's shifted tokens; `batch` samples at a
        time, None for all N at once. Raises ConfigError where there is no loss.
        """
        ...


class Dense(Protocol):
    """The model before pruning, as an eval registered with `needs="dense"` is handed it."""

    @property
    def itself(self) -> bool:
        """Whether the model that is measured is the dense one."""
        ...

    def load(self) -> nn.Module:
        """The dense model: the one that is measured, or loaded anew."""
        ...

    def remember(
        self, name: str, compute: Callable[[nn.Module], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """What `compute` gives of the dense model, on the CPU: once for all runs with the same
        weights, options and code.
        """
        ...


class Remember(Protocol):
    """How a pruner or a ratio keeps on disk what it computes of the dense model and the text."""

    def __call__(
        self,
        module: str,
        name: str,
        parts: Sequence[Any],
        compute: Callable[[], dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """What `compute` gives: once for all runs with the same model, text and `parts`, and the
        same code of `module` (`__name__`) and of what it imports. `name` is what a result calls it.
        """
        ...


@dataclass(frozen=True)
class SubLayer:
    """What a part of a block (attention, feed-forward, a single matrix) can become.

    Attributes:
        group: its heads or neurons, or the elements of the matrix.
        removed: units that are gone at each level, ascending; the first is 0, and the last may be
            all of them, where the sub-layer itself can go.
        errors: squared error of the part's output at each level, a token; of a matrix relative to
            the dense output.
        cost: what removing so many units costs, in all: of units before the ridge is chosen, of
            elements between two levels in proportion.
    """

    group: Group
    removed: tuple[int, ...]
    errors: tuple[float, ...]
    cost: Callable[[int], float]


class LocalSolutions(Protocol):
    """Parts solved each by itself at a few levels, for ratios that choose among them."""

    @property
    def key(self) -> Sequence[Any]:
        """The options that the solutions depend on."""
        ...

    @property
    def sublayers(self) -> Sequence[SubLayer]:
        """In the order of the forward pass; solved when first asked for."""
        ...

    def most(self, group: Group) -> int:
        """Units of a group that may go; shapes tell."""
        ...

    def assembled(self) -> AbstractContextManager[Callable[[Sequence[int]], None]]:
        """Inside, the function that is yielded puts a choice of levels, one number a sub-layer,
        into the model; afterwards the model is as it was. Shapes stay.
        """
        ...


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
