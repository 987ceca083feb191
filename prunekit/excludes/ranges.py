"""Which blocks are left alone: the first and last ones carry most of what a model cannot lose (LLM-Pruner, appendix B)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from prunekit.registry import Natural, excludes
from prunekit.types import Group

Range = Annotated[list[int], Field(min_length=2, max_length=2)]


@excludes.register()
def none(groups: list[Group]) -> list[Group]:
    """Nothing is left alone."""
    return groups


@excludes.register()
def ends(groups: list[Group], *, first: Natural = 3, last: Natural = 1) -> list[Group]:
    """Leaves the `first` blocks and the `last` blocks alone (the paper's advice: 3 and 1). Residual channels cross all blocks and stay in."""
    depth = 1 + max((g.layer for g in groups if g.layer is not None), default=0)
    return [g for g in groups if g.layer is None or first <= g.layer < depth - last]


@excludes.register("range")
def layer_range(groups: list[Group], *, heads: Range | None = None, neurons: Range | None = None) -> list[Group]:
    """Prunes only blocks `start <= i < end` (0-based, as LLM-Pruner's flags), attention and FFN apart; null = every block.

    `[0, 0]` leaves that kind alone altogether. `heads` rules every unit inside an attention, `neurons` everything else in a block.
    """

    def inside(g: Group) -> bool:
        bounds = heads if g.kind == "heads" else neurons
        return g.layer is None or bounds is None or bounds[0] <= g.layer < bounds[1]

    return [g for g in groups if inside(g)]
