"""Which blocks are left alone: the first and last ones carry most of what a model cannot lose
(LLM-Pruner, appendix B).
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

from pydantic import AfterValidator, Field

from prunekit.errors import ConfigError
from prunekit.registry import Natural, excludes
from prunekit.types import Group


def _ascending(bounds: list[int]) -> list[int]:
    if bounds[0] > bounds[1]:
        raise ValueError("the first block comes after the last")
    return bounds


Range = Annotated[list[Natural], Field(min_length=2, max_length=2), AfterValidator(_ascending)]
"""Blocks `start <= i < end`; two alike name none."""


@excludes.register()
def none(groups: list[Group]) -> list[Group]:
    """Nothing is left alone."""
    return groups


@excludes.register()
def ends(groups: list[Group], *, first: Natural = 3, last: Natural = 1) -> list[Group]:
    """Leaves the `first` blocks and the `last` blocks alone (the paper's advice: 3 and 1). Residual
    channels stay in.
    """
    depth = depth_of(groups)
    found = [between(g, first, g.units - last) if g.kind == "blocks" else g for g in groups]
    return [g for g in found if g.units and (g.layer is None or first <= g.layer < depth - last)]


def depth_of(groups: list[Group]) -> int:
    """How many blocks the model has, as its groups tell."""
    return max(len(g.modules) if g.layer is None else 1 + g.layer for g in groups)


def between(group: Group, start: int, stop: int) -> Group:
    """The group of blocks without those before `start` and from `stop` on; its units are the blocks
    in between.
    """
    modules = group.modules[start : max(start, stop)]
    return dataclasses.replace(group, units=len(modules), modules=modules, shape=(len(modules),))


@excludes.register("range")
def layer_range(
    groups: list[Group],
    *,
    heads: Range | None = None,
    neurons: Range | None = None,
    blocks: Range | None = None,
) -> list[Group]:
    """Prunes only blocks `start <= i < end` (0-based, as LLM-Pruner's flags), attention and FFN
    apart; null = every block.

    `[0, 0]` leaves that kind alone altogether. `heads` rules every unit inside an attention,
    `neurons` everything else in a block, `blocks` which blocks may go as a whole. Raises
    ConfigError for a range that goes beyond the model, and where there is none at all.
    """
    if (heads, neurons, blocks) == (None, None, None):
        raise ConfigError(
            "exclude=range has no range: give exclude.heads=[first,end], exclude.neurons or "
            "exclude.blocks; exclude=none leaves nothing alone"
        )
    depth = depth_of(groups)
    for name, bounds in (("heads", heads), ("neurons", neurons), ("blocks", blocks)):
        if bounds is not None and bounds[1] > depth:
            raise ConfigError(
                f"exclude.{name}={bounds}: the model has {depth} blocks, the range ends at {depth} "
                "at most"
            )

    def inside(g: Group) -> bool:
        bounds = heads if g.kind == "heads" else neurons
        return g.layer is None or bounds is None or bounds[0] <= g.layer < bounds[1]

    found = [
        between(g, *blocks) if g.kind == "blocks" and blocks is not None else g for g in groups
    ]
    return [g for g in found if g.units and inside(g)]
