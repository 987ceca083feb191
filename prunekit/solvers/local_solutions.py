"""A database of local solutions: every sub-layer solved by itself at a few levels, on the dense
network (the database as in EvoPress, arXiv 2410.14649).

Of a level only what differs from the dense model is kept: the columns of the reader that stay, and
its bias. Each sub-layer is an entry of the cache of its own, so that a run that was cut off goes on
with the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from prunekit.activations.blockwise import BlockInputs, capture_inputs
from prunekit.activations.dense_reference import PairedStreams, UnitReader
from prunekit.activations.storage import Activations, PassOptions
from prunekit.architecture.streaming import turn
from prunekit.errors import ConfigError
from prunekit.solvers.obs import columns_left
from prunekit.solvers.obs_levels import (
    LevelOptions,
    Solution,
    bypass_outputs,
    counts_of_levels,
    solve_levels,
)
from prunekit.solvers.validated_ridge import FOLDS
from prunekit.types import Counts, Group, Kept, Remember, SubLayer, tensor_of


@dataclass
class DenseStream:
    """The text on its way through the dense blocks; a block is reached when it is asked for."""

    model: nn.Module
    blocks: tuple[str, ...]
    tokens: Callable[[], Tensor]
    options: PassOptions
    at: int = 0
    held: tuple[Activations, BlockInputs] | None = None

    def streams(self, block: int, names: list[str]) -> PairedStreams:
        """What reaches the readers `names` of a block; blocks are asked for in ascending order."""
        if self.held is None:
            self.held = capture_inputs(self.model, self.blocks, self.tokens(), self.options)
        own, feed = self.held
        while self.at < block:
            module = self.model.get_submodule(self.blocks[self.at])
            PairedStreams(feed, self.at, [], module, None, own, False).advance(module)
            self.at += 1
        module = self.model.get_submodule(self.blocks[block])
        return PairedStreams(feed, block, names, module, None, own, False)


@dataclass
class ObsLevels:
    """`types.LocalSolutions` of the groups in `wanted`, solved when first asked for."""

    model: nn.Module
    blocks: tuple[str, ...]
    readers: list[list[UnitReader]]
    wanted: Sequence[Group]
    tokens: Callable[[], Tensor]
    how: LevelOptions
    options: PassOptions
    remember: Remember
    solved: dict[str, Solution] = field(default_factory=dict)

    @cached_property
    def chosen(self) -> list[UnitReader]:
        """The readers of the groups that may lose units, in the order of the forward pass."""
        names = {g.name for g in self.wanted}
        return [r for row in self.readers for r in row if r.group.name in names]

    @property
    def key(self) -> list[Any]:
        how = self.how
        return [how.levels, how.whole, how.bias, how.relative, how.ridge, *self.options]

    @cached_property
    def sublayers(self) -> list[SubLayer]:
        self._solve()
        return [
            SubLayer(
                r.group,
                tuple(self.solved[r.group.name]["removed"].tolist()),
                tuple(self.solved[r.group.name]["errors"].tolist()),
                self.solved[r.group.name]["costs"],
            )
            for r in self.chosen
        ]

    @torch.no_grad()
    def _solve(self) -> None:
        if len(self.solved) == len(self.chosen):
            return
        self.tokens()  # where only shapes are known, this says so
        dense = DenseStream(self.model, self.blocks, self.tokens, self.options)
        places = [(b, r) for b, row in enumerate(self.readers) for r in row]
        for b, r in tqdm(places, desc="local solutions", unit="sub-layer"):
            if r in self.chosen:
                name = f"solutions/{r.group.name}"
                compute = partial(self._solution, dense, b, r)
                self.solved[r.group.name] = self.remember(__name__, name, self.key, compute)

    def _solution(self, dense: DenseStream, b: int, r: UnitReader) -> Solution:
        """One sub-layer of block number `b`."""
        streams = dense.streams(b, [other.inside for other in self.readers[b]])
        folds = 1 if self.how.ridge is not None else FOLDS
        module = self.model.get_submodule(self.blocks[b])
        with turn(module):
            stats = streams.regression(module, r, self.how.relative, folds)
            outputs = bypass_outputs(streams, self.blocks[b], r) if self.how.whole else 0
            return solve_levels(stats, r, self.how, outputs)

    def mask(self, group: str, removed: int) -> Tensor:
        """(U,) bool: the units of a group that stay when so many go."""
        order = self.solved[group]["order"]
        mask = torch.ones(len(order), dtype=torch.bool)
        mask[order[:removed].cpu()] = False
        return mask

    def stand_ins(self, counts: Counts) -> dict[str, int]:
        """Outputs of the `Bypass` for each group that loses all its units. Raises ConfigError where
        none can stand in the place of its sub-layer.
        """
        gone = [r.group.name for r in self.chosen if counts.get(r.group.name) == r.group.units]
        if gone:
            self._solve()
        found = {name: int(self.solved[name]["outputs"]) for name in gone}
        if fixed := [name for name, outputs in found.items() if not outputs]:
            raise ConfigError(
                f"{fixed[0]} cannot lose all its units: its sub-layer is no module that another "
                "could replace, or pruner.whole=false"
            )
        return found

    @contextmanager
    def assembled(self) -> Iterator[Callable[[Sequence[int]], None]]:
        sublayers, standing = self.sublayers, [0] * len(self.chosen)
        before = [r.reader.weight.detach().clone() for r in self.chosen]
        biases: list[Any] = [r.reader.module.bias for r in self.chosen]

        @torch.no_grad()
        def put(levels: Sequence[int]) -> None:
            for i, (r, level) in enumerate(zip(self.chosen, levels, strict=True)):
                if level != standing[i]:
                    place(r, before[i], biases[i])
                    self.write(r, sublayers[i].removed[level])
                    standing[i] = level

        try:
            yield put
        finally:
            put([0] * len(standing))

    def write(self, r: UnitReader, removed: int) -> None:
        """Give a dense reader the weights of a level: zeros where units are gone."""
        if not removed:
            return
        found, weight = self.solved[r.group.name], r.reader.weight
        old: nn.Parameter | None = r.reader.module.bias  # type: ignore[assignment]
        bias = None if old is None else old.detach()
        weight.zero_()
        if removed == r.group.units:
            bias = None if bias is None else torch.zeros_like(bias)
        else:
            mask = self.mask(r.group.name, removed)
            columns = columns_left(r.reader.member.index, mask, weight.shape[1])
            weight[:, columns.to(weight.device)] = found[f"weight.{removed}"].to(weight)
            if f"bias.{removed}" in found:
                added = found[f"bias.{removed}"].to(weight)
                bias = added if bias is None else bias + added
        if bias is not None:
            r.reader.module.bias = nn.Parameter(bias, requires_grad=weight.requires_grad)

    def at_levels(self, counts: Counts) -> Counts:
        """`counts`, each brought down to a level."""
        at = {s.group.name: s.removed for s in self.sublayers}
        return {name: max(n for n in at[name] if n <= count) for name, count in counts.items()}

    @torch.no_grad()
    def put_in(self, counts: Counts) -> Kept:
        """Gives the model the solutions of these levels, with zeros in the places of the units that
        are gone. Returns the masks of the groups that lose some.
        """
        kept: Kept = {}
        self._solve()
        for r in self.chosen:
            if removed := counts.get(r.group.name):
                self.write(r, removed)
                mask = kept[r.group.name] = self.mask(r.group.name, removed)
                for m in r.group.members:
                    tensor = tensor_of(self.model, m.param)
                    if isinstance(tensor, nn.Parameter) and m.param != r.reader.name + ".weight":
                        gone = m.index[~mask].flatten().to(tensor.device)
                        tensor.index_fill_(m.axis, gone, 0)
        return kept

    def bytes(self) -> int:
        """Of all solutions on disk, from shapes alone; a level's order and bias are left out."""
        total = 0
        for r in self.chosen:
            weight, units = r.reader.weight, r.group.units
            for count in counts_of_levels(units, self.how.levels, False)[1:]:
                left = weight.shape[1] - count * r.reader.member.width
                total += weight.shape[0] * left * weight.element_size()
        return total


def place(r: UnitReader, weight: Tensor, bias: nn.Parameter | None) -> None:
    """A reader as it was."""
    r.reader.weight.copy_(weight)
    r.reader.module.bias = bias  # type: ignore[assignment]
