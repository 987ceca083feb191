"""What sub-networks of a model take: parameters, or what a budget counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import nn

from prunekit.architecture.sizes import Sizes
from prunekit.selection.budgets import prices_of
from prunekit.selection.prices import Prices
from prunekit.types import Counts, Group, Kept, Remember

Cost = Literal["params", "memory_mib", "kv_cache", "macs", "latency_ms"]
"""What is to be low beside the loss."""


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

    def of(self, kept: Kept) -> int:
        """The parameters of the model without what is not kept; what lies in a block that goes,
        goes with it.
        """
        gone = gone_blocks(self.groups, kept)
        counts: Counts = {
            g.name: int((~kept[g.name]).sum())
            for g in self.groups
            if g.kind != "blocks" and not inside(g, gone)
        }
        return self.sizes.total - sum(self.blocks[b] for b in gone) - self.sizes.removed(counts)


class SubnetPrices:
    """What the sub-networks of a model take of a budget other than parameters.

    Attributes:
        units: the groups that `prices` knows; what lies in a block that goes, goes with it.
    """

    def __init__(self, prices: Prices, units: Sequence[Group], groups: Sequence[Group]):
        self.prices, self.units, self.groups = prices, units, groups

    def of(self, kept: Kept) -> float:
        """Of the model without what is not kept."""
        gone = gone_blocks(self.groups, kept)
        counts = {
            g.name: g.units if inside(g, gone) else int((~kept[g.name]).sum())
            for g in self.units
            if g.name in kept or inside(g, gone)
        }
        return self.prices.dense - self.prices.saved(counts)


def gone_blocks(groups: Sequence[Group], kept: Kept) -> list[str]:
    """Names of the blocks that are not kept."""
    return [
        path
        for g in groups
        if g.kind == "blocks"
        for path, stays in zip(g.modules, kept[g.name].tolist(), strict=True)
        if not stays
    ]


def inside(group: Group, blocks: Sequence[str]) -> bool:
    """Whether the group's units lie in one of the blocks."""
    return any(group.members[0].param.startswith(f"{b}.") for b in blocks)


def costs_of(
    model: nn.Module,
    everything: Sequence[Group],
    groups: Sequence[Group],
    of: Cost,
    request: Mapping[str, int],
    remember: Remember,
) -> SubnetSizes | SubnetPrices:
    """What sub-networks over `groups` take, of the model's groups `everything`."""
    if of == "params":
        return SubnetSizes(model, groups)
    units = [g for g in everything if g.kind in ("heads", "neurons")]
    return SubnetPrices(prices_of(model, units, of, request, remember), units, groups)
