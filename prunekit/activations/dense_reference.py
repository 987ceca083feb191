"""The network being pruned and the dense one side by side at one block: what the readers inside
get, and what they should give.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from prunekit.activations.blockwise import Activations, Feed, enough, until_seen
from prunekit.activations.gram import Normal
from prunekit.activations.moments import watch
from prunekit.architecture.linear import Reader, readers
from prunekit.types import Group


@dataclass(frozen=True)
class Part:
    """One module of a block that adds to the residual stream, and the group of units
    that it reads.
    """

    group: Group
    reader: Reader
    inside: str
    """Its name inside the block."""


def parts_of(model: nn.Module, block: str, groups: list[Group]) -> list[Part]:
    """The parts of a block, in the order of its modules; groups with no single reader in it are
    left out.
    """
    order = {id(m): i for i, m in enumerate(model.get_submodule(block).modules())}
    found = []
    for g in groups:
        inside = [r for r in readers(model, g) if r.name.startswith(block + ".")]
        found += [Part(g, r, r.name[len(block) + 1 :]) for r in inside if len(inside) == 1]
    return sorted(found, key=lambda p: order[id(p.reader.module)])


class Seen(NamedTuple):
    """What one batch showed inside a block: each reader's input and output, the residual stream
    after it, and the block's output.
    """

    x: dict[str, Tensor]
    y: dict[str, Tensor]
    after: dict[str, Tensor]
    out: Tensor


def look(
    feed: Feed,
    module: nn.Module,
    block: int,
    batch: int,
    x: Tensor,
    names: list[str],
    last: str | None = None,
) -> Seen:
    """Run a block on the hidden state `x (n, T, C)`, no further than the reader `last`; readers
    stand in `names` in order.
    """
    seen = Seen({}, {}, {}, x)
    out = x

    def leave(name: str, y: Tensor) -> None:
        seen.y[name] = y.float().reshape(*x.shape[:-1], -1)  # OPT flattens samples and tokens
        seen.after[name] = sum(seen.y.values(), x.float())
        if name == last:
            enough()

    with (
        until_seen(),
        watch(
            module,
            {n: partial(seen.x.__setitem__, n) for n in names},
            {n: partial(leave, n) for n in names},
        ),
    ):
        out = feed.forward(module, block, batch, x)
    return seen._replace(out=out)


HUGE = 4.0
"""A token whose size exceeds this many times the median is a sink: attention rests on it, and its
activations are of a class of their own.
"""


def importance(residual: Tensor, relative: bool) -> tuple[Tensor | None, Tensor]:
    """How much each token's error counts `(...)` at a place of the residual stream `(..., C)`
    (None: all alike), and which are sinks.

    With `relative`, it counts relative to the token's root mean square, which the next norm divides
    by.
    """
    size = residual.float().square().mean(-1).sqrt().clamp(min=1e-6)
    return (size.square().reciprocal() if relative else None), size > HUGE * size.median()


def adds_up(feed: Feed, b: int, module: nn.Module, inputs: Activations, names: list[str]) -> bool:
    """Whether the block's output is its input plus what the modules `names` put out, seen on one
    batch.

    False where a norm or a factor stands between (Gemma 2, Granite), or where experts add to it
    too.
    """
    x = inputs[feed.rows[0]]
    seen = look(feed, module, b, 0, x, names)
    added = seen.after[names[-1]] - x if names else torch.zeros_like(x)
    moved = seen.out - x
    return bool((moved - added).float().norm() <= 0.01 * moved.float().norm())


@dataclass
class Streams:
    """The network being pruned and the dense one, side by side at one block.

    With `adds`, a reader's output should move so that the network's residual stream after it
    becomes the dense one's; without, so that it becomes its own dense output. `dense=None`: it
    should stay.
    """

    feed: Feed
    block: int
    names: list[str]
    before: nn.Module
    dense: Activations | None
    own: Activations
    adds: bool
    passed: bool = False
    """Whether the dense stream stands behind this block already."""

    def regression(self, module: nn.Module, p: Part, relative: bool) -> Normal:
        """Sums over what a reader gets in the network pruned so far and, beside the dense one, how
        far its output should move.
        """
        outputs, inputs = p.reader.weight.shape
        stats = Normal(
            inputs, 0 if self.dense is None else outputs, p.reader.weight.device, self.feed.bf16
        )
        ends = (
            p.inside == self.names[-1]
        )  # what the dense block puts out is known then, and its input not needed any more
        for i, rows in enumerate(self.feed.rows):
            mine = look(self.feed, module, self.block, i, self.own[rows], self.names, p.inside)
            after, move = mine.after[p.inside], None
            if self.dense is not None:
                theirs = look(
                    self.feed,
                    self.before,
                    self.block,
                    i,
                    self.dense[rows],
                    self.names,
                    None if ends else p.inside,
                )
                if ends:
                    self.dense[rows] = theirs.out
                after = theirs.after[p.inside]
                move = (
                    after - mine.after[p.inside]
                    if self.adds
                    else theirs.y[p.inside] - mine.y[p.inside]
                )
            stats.add(mine.x[p.inside], move, *importance(after, relative))
        self.passed = ends and self.dense is not None
        return stats

    def advance(self, module: nn.Module) -> None:
        """Bring both streams to the next block."""
        for i, rows in enumerate(self.feed.rows):
            self.own[rows] = self.feed.forward(module, self.block, i, self.own[rows])
            if self.dense is not None and not self.passed:
                self.dense[rows] = self.feed.forward(self.before, self.block, i, self.dense[rows])
