"""Spaces of sub-networks of one model (Klein et al., 2024, arXiv 2405.02267): each is a choice of
how many, or which, of its units stay, and all share the model's weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from prunekit.architecture.sizes import Sizes
from prunekit.types import Counts, Group, Kept

Extent = Literal["small", "medium", "large"]
Choice = tuple[int, ...]
"""How much goes by each coordinate of a space, 0 is nothing."""


@dataclass(frozen=True)
class Subnets:
    """A space over `groups`.

    Attributes:
        extent: a coordinate is the share of a kind (`small`), of a group (`medium`), or one unit
            (`large`).
        order: units of each group, those that go first before the others.
        levels: steps between a whole group and its last unit, but for `large`.
    """

    groups: Sequence[Group]
    extent: Extent
    order: Mapping[str, Tensor]
    levels: int

    @property
    def coordinates(self) -> list[int]:
        """The largest value of each coordinate."""
        if self.extent == "large":
            return [1] * sum(g.units for g in self.groups)
        if self.extent == "medium":
            return [min(self.levels, g.units - 1) for g in self.groups]
        return [self.levels] * len(self.kinds)

    @property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(g.kind for g in self.groups))

    @property
    def whole(self) -> Choice:
        return (0,) * len(self.coordinates)

    @property
    def smallest(self) -> Choice:
        return self.even(1.0)

    def even(self, share: float) -> Choice:
        """The same share of every group, in the order of its units."""
        if self.extent != "large":
            return tuple(round(share * most) for most in self.coordinates)
        found: list[int] = []
        for g in self.groups:
            gone = torch.zeros(g.units, dtype=torch.int64)
            gone[self.order[g.name][: round(share * (g.units - 1))]] = 1
            found += gone.tolist()
        return tuple(found)

    def kept(self, choice: Choice) -> Kept:
        """(U,) True for the units that stay; one of each group does, whatever is chosen."""
        if self.extent == "large":
            parts = torch.tensor(choice).split([g.units for g in self.groups])
            found = {g.name: part == 0 for g, part in zip(self.groups, parts, strict=True)}
            for name, mask in found.items():
                mask[self.order[name][-1]] |= not mask.any()
            return found
        most = self.coordinates
        found = {}
        for i, g in enumerate(self.groups):
            at = i if self.extent == "medium" else self.kinds.index(g.kind)
            gone = round(choice[at] / max(1, most[at]) * (g.units - 1))
            found[g.name] = torch.ones(g.units, dtype=torch.bool)
            found[g.name][self.order[g.name][:gone]] = False
        return found

    def draw(self, generator: torch.Generator) -> Choice:
        """Any size is as likely as another; within it coordinates are independent."""
        share = torch.rand((), generator=generator)
        return tuple(
            int((torch.rand(most, generator=generator) < share).sum()) for most in self.coordinates
        )

    def neighbour(self, choice: Choice, generator: torch.Generator) -> Choice:
        """Another value of one coordinate."""
        free = [i for i, most in enumerate(self.coordinates) if most]
        at = free[int(torch.randint(len(free), (), generator=generator))]
        step = 1 + int(torch.randint(self.coordinates[at], (), generator=generator))
        value = (choice[at] + step) % (self.coordinates[at] + 1)
        return (*choice[:at], value, *choice[at + 1 :])


class SubnetSizes:
    """Exact parameters of the sub-networks of a model, from shapes."""

    def __init__(self, model: nn.Module, groups: Sequence[Group]):
        self.sizes = Sizes(model, groups)
        self.groups = groups
        self.blocks = {
            path: sum(p.numel() for p in model.get_submodule(path).parameters())
            for g in groups
            if g.kind == "blocks"
            for path in g.modules
        }

    def params(self, kept: Kept) -> int:
        """Of the model without what is not kept; what lies in a block that goes, goes with it."""
        gone = [
            path
            for g in self.groups
            if g.kind == "blocks"
            for path, stays in zip(g.modules, kept[g.name].tolist(), strict=True)
            if not stays
        ]
        counts: Counts = {
            g.name: int((~kept[g.name]).sum())
            for g in self.groups
            if g.kind != "blocks" and not self._inside(g, gone)
        }
        return self.sizes.total - sum(self.blocks[b] for b in gone) - self.sizes.removed(counts)

    def _inside(self, group: Group, blocks: Sequence[str]) -> bool:
        return any(group.members[0].param.startswith(f"{b}.") for b in blocks)
