"""A database of sub-layers, each solved by structured OBS at a few levels: of a level the columns
of the reader that stay, and its bias.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.activations.dense_reference import PairedStreams, UnitReader
from prunekit.activations.dense_stream import DenseStream
from prunekit.architecture.mapped import release
from prunekit.architecture.streaming import turn
from prunekit.errors import ConfigError
from prunekit.solvers.level_database import LevelDatabase
from prunekit.solvers.obs import columns_left
from prunekit.solvers.obs_levels import (
    LevelOptions,
    Solution,
    bypass_outputs,
    counts_of_levels,
    solve_levels,
)
from prunekit.solvers.validated_ridge import FOLDS
from prunekit.types import Counts, Group, Kept, tensor_of


@dataclass(kw_only=True)
class ObsLevels(LevelDatabase):
    """The groups in `wanted`, of which each is read by one of `readers`, by block."""

    readers: list[list[UnitReader]]
    wanted: Sequence[Group]
    how: LevelOptions

    @property
    def key(self) -> list[Any]:
        how = self.how
        return [how.levels, how.whole, how.bias, how.relative, how.ridge, *self.options]

    @cached_property
    def chosen(self) -> dict[str, UnitReader]:
        """By group, the readers of those that may lose units, in the order of the forward pass."""
        names = {g.name for g in self.wanted}
        return {r.group.name: r for row in self.readers for r in row if r.group.name in names}

    @cached_property
    def places(self) -> list[tuple[int, Group]]:
        rows = enumerate(self.readers)
        return [(b, r.group) for b, row in rows for r in row if r.group.name in self.chosen]

    def most(self, group: Group) -> int:
        return group.units

    def cost(self, group: Group, removed: int) -> float:
        return float(self.solved[group.name]["costs"][removed - 1]) if removed else 0.0

    def solution(self, dense: DenseStream, block: int, group: Group) -> Solution:
        run, r = dense.run(block), self.chosen[group.name]
        names, module = [other.inside for other in self.readers[block]], run.module
        streams = PairedStreams(run.feed, block, names, module, None, run.inputs, False)
        folds = 1 if self.how.ridge is not None else FOLDS
        with turn(module):
            stats = streams.regression(module, r, self.how.relative, folds)
            outputs = bypass_outputs(streams, self.blocks[block], r) if self.how.whole else 0
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
        gone = [name for name, r in self.chosen.items() if counts.get(name) == r.group.units]
        if gone:
            self.solve()
        found = {name: int(self.solved[name]["outputs"]) for name in gone}
        if fixed := [name for name, outputs in found.items() if not outputs]:
            raise ConfigError(
                f"{fixed[0]} cannot lose all its units: its sub-layer is no module that another "
                "could replace, or pruner.whole=false"
            )
        return found

    def weight(self, group: Group) -> Tensor:
        return self.chosen[group.name].reader.weight

    def restorer(self, group: Group) -> Callable[[], None]:
        module, restore_weight = self.chosen[group.name].reader.module, super().restorer(group)
        bias: Any = module.bias

        def restore() -> None:
            restore_weight()
            module.bias = bias

        return restore

    def write(self, group: Group, removed: int) -> None:
        """Zeros where units are gone."""
        if not removed:
            return
        r = self.chosen[group.name]
        found, weight = self.solved[group.name], r.reader.weight
        old: nn.Parameter | None = r.reader.module.bias  # type: ignore[assignment]
        bias = None if old is None else old.detach()
        weight.zero_()
        if removed == group.units:
            bias = None if bias is None else torch.zeros_like(bias)
        else:
            mask = self.mask(group.name, removed)
            columns = columns_left(r.reader.member.index, mask, weight.shape[1])
            left = found[f"weight.{removed}"]
            weight[:, columns.to(weight.device)] = left.to(weight)
            release([left])
            if f"bias.{removed}" in found:
                added = found[f"bias.{removed}"].to(weight)
                bias = added if bias is None else bias + added
        if bias is not None:
            r.reader.module.bias = nn.Parameter(bias, requires_grad=weight.requires_grad)

    @torch.no_grad()
    def put_in(self, counts: Counts) -> Kept:
        """Gives the model the solutions of these levels, with zeros in the places of the units that
        are gone. Returns the masks of the groups that lose some.
        """
        kept: Kept = {}
        self.solve()
        for name, r in self.chosen.items():
            if removed := counts.get(name):
                self.write(r.group, removed)
                mask = kept[name] = self.mask(name, removed)
                for m in r.group.members:
                    tensor = tensor_of(self.model, m.param)
                    if isinstance(tensor, nn.Parameter) and m.param != r.reader.name + ".weight":
                        gone = m.index[~mask].flatten().to(tensor.device)
                        tensor.index_fill_(m.axis, gone, 0)
        return kept

    def bytes(self) -> int:
        """Of all solutions on disk, from shapes alone; a level's order and bias are left out."""
        total = 0
        for r in self.chosen.values():
            weight, units = r.reader.weight, r.group.units
            for count in counts_of_levels(units, self.how.levels, False)[1:]:
                left = weight.shape[1] - count * r.reader.member.width
                total += weight.shape[0] * left * weight.element_size()
        return total
