"""Spaces of sub-networks of one model (Klein et al., 2024, arXiv 2405.02267): each is a choice of
how many, or which, of its units stay, and all share the model's weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

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
        most, counts = self.coordinates, {}
        for i, g in enumerate(self.groups):
            at = i if self.extent == "medium" else self.kinds.index(g.kind)
            counts[g.name] = round(choice[at] / max(1, most[at]) * (g.units - 1))
        return self.without(counts)

    def without(self, counts: Counts) -> Kept:
        """All but the first so many of each group."""
        found = {g.name: torch.ones(g.units, dtype=torch.bool) for g in self.groups}
        for name, n in counts.items():
            found[name][self.order[name][:n]] = False
        return found

    def draw(self, generator: torch.Generator, share: Tensor | float | None = None) -> Choice:
        """About such a share of everything goes, where it is not given any is as likely as another;
        within it coordinates are independent.
        """
        if share is None:
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
