"""The network being pruned and the dense one side by side at one block: what the readers inside
get, and what they should give.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from prunekit.activations import processes
from prunekit.activations.block_inputs import BlockInputs
from prunekit.activations.gram import GramStatistics
from prunekit.activations.hooks import hook_activations, raise_stop, stop_early
from prunekit.activations.storage import Activations
from prunekit.architecture.linear import Reader, readers
from prunekit.architecture.streaming import turn
from prunekit.errors import ConfigError
from prunekit.types import Group


@dataclass(frozen=True)
class UnitReader:
    """One module of a block that adds to the residual stream, and the group of units
    that it reads.
    """

    group: Group
    reader: Reader
    inside: str
    """Its name inside the block."""


def unit_readers(model: nn.Module, block: str, groups: list[Group]) -> list[UnitReader]:
    """The readers in a block, in the order of its modules; groups with no single one are left
    out.
    """
    order = {id(m): i for i, m in enumerate(model.get_submodule(block).modules())}
    found = []
    for g in groups:
        inside = [r for r in readers(model, g) if r.name.startswith(block + ".")]
        found += [UnitReader(g, r, r.name[len(block) + 1 :]) for r in inside if len(inside) == 1]
    return sorted(found, key=lambda p: order[id(p.reader.module)])


READABLE = ("heads", "neurons")
"""Kinds of units that one linear module of a block reads, as a rule."""


def readers_by_block(
    model: nn.Module, blocks: tuple[str, ...], groups: list[Group]
) -> list[list[UnitReader]]:
    """The readers of the heads and neurons among `groups`, in each block. Those inside of the
    experts of a list, which do not see every token, are none.
    """
    routed = tuple(f"{path}." for g in groups if g.kind == "experts" for path in g.modules)
    readable = [
        g for g in groups if g.kind in READABLE and not g.members[0].param.startswith(routed)
    ]
    return [unit_readers(model, block, readable) for block in blocks]


def check_readers(groups: list[Group], readers: list[list[UnitReader]]) -> None:
    """Raises ConfigError naming a group that no single linear module of a block reads."""
    served = {r.group.name for row in readers for r in row}
    lost = [g.name for g in groups if g.name not in served]
    if lost:
        more = f" and {len(lost) - 1} more groups" if len(lost) > 1 else ""
        raise ConfigError(
            "structured OBS needs one linear module in the block that reads the units of every "
            f"token; {lost[0]}{more} have none: narrow pruner.kinds, or for neurons of experts "
            "take pruner=expert_neurons pruner.score=obs"
        )


class Seen(NamedTuple):
    """What one batch showed inside a block: each reader's input and output, the residual stream
    after it, and the block's output.
    """

    x: dict[str, Tensor]
    y: dict[str, Tensor]
    after: dict[str, Tensor]
    out: Tensor


def forward_until(
    feed: BlockInputs,
    module: nn.Module,
    block: int,
    batch: int,
    x: Tensor,
    names: list[str],
    *,
    last: str | None = None,
) -> Seen:
    """Run `module`, standing where block number `block` stands, on the hidden state `x (n, T, C)`
    of a batch, no further than the reader `last`; readers stand in `names` in order.

    Raises ConfigError for a reader that does not see every token.
    """
    seen = Seen({}, {}, {}, x)
    out = x

    def leave(name: str, y: Tensor) -> None:
        if y.shape[:-1].numel() != x.shape[:-1].numel():
            raise ConfigError(
                f"{name} of a block does not see every token (an expert?), so that structured OBS "
                "cannot tell what the residual stream gets from it: narrow pruner.kinds"
            )
        seen.y[name] = y.float().reshape(*x.shape[:-1], -1)  # OPT flattens samples and tokens
        seen.after[name] = sum(seen.y.values(), x.to(y.device).float())
        if name == last:
            raise_stop()

    with (
        stop_early(),
        hook_activations(
            module,
            {n: partial(seen.x.__setitem__, n) for n in names},
            {n: partial(leave, n) for n in names},
        ),
    ):
        out = feed.forward(module, block, batch, x)
    return seen._replace(out=out)


def token_weights(residual: Tensor, relative: bool) -> Tensor | None:
    """How much each token's error counts `(...)` at a place of the residual stream `(..., C)`; None
    where all count alike.

    With `relative`, it counts relative to the token's root mean square, which the next norm divides
    by.
    """
    if not relative:
        return None
    return residual.float().square().mean(-1).clamp(min=1e-12).reciprocal()


def is_residual_sum(
    feed: BlockInputs, b: int, module: nn.Module, inputs: Activations, names: list[str]
) -> bool:
    """Whether the block's output is its input plus what the modules `names` put out, seen on one
    batch.

    False where a norm or a factor stands between (Gemma 2, Granite), or where experts add to it
    too.
    """
    x = inputs[feed.rows[0]]
    seen = forward_until(feed, module, b, 0, x, names)
    x = x.to(seen.out.device)
    added = seen.after[names[-1]] - x if names else torch.zeros_like(x)
    moved = seen.out - x
    return bool((moved - added).float().norm() <= 0.01 * moved.float().norm())


def add_in_turn(
    stats: list[GramStatistics], rows: slice, x: Tensor, y: Tensor | None, w: Tensor | None
) -> None:
    """Sample number i of all, of which `rows` are here, goes to sum number i modulo their
    number.
    """
    samples = rows.stop - rows.start
    x = x.reshape(samples, -1, x.shape[-1])
    y = None if y is None else y.reshape(samples, -1, y.shape[-1])
    w = None if w is None else w.reshape(samples, -1)
    for fold, sums in enumerate(stats):
        mine = slice((fold - rows.start) % len(stats), None, len(stats))
        if len(x[mine]):
            sums.add(x[mine], None if y is None else y[mine], None if w is None else w[mine])


@dataclass
class PairedStreams:
    """The network being pruned and the dense one, side by side at one block.

    With `adds`, a reader's output should move so that the network's residual stream after it
    becomes the dense one's; without, so that it becomes its own dense output. `dense=None`: it
    should stay.
    """

    feed: BlockInputs
    block: int
    names: list[str]
    before: nn.Module
    dense: Activations | None
    own: Activations
    adds: bool
    passed: bool = False
    """Whether the dense stream stands behind this block already."""

    def regression(
        self, module: nn.Module, p: UnitReader, relative: bool, folds: int = 1
    ) -> list[GramStatistics]:
        """Sums over what a reader gets in the network pruned so far and, beside the dense one, how
        far its output should move; samples go to the `folds` sums in turn.
        """
        outputs, inputs = p.reader.weight.shape
        device, bf16 = p.reader.weight.device, self.feed.precision == "bf16"
        moves = 0 if self.dense is None else outputs
        stats = [GramStatistics(inputs, moves, device, bf16) for _ in range(folds)]
        # What the dense block puts out is known then, and its input not needed any more; but not in
        # a process that sees a part of the batches.
        ends = p.inside == self.names[-1] and processes.count() == 1
        for i, rows in processes.own(list(enumerate(self.feed.rows))):
            mine = self._seen(module, i, self.own[rows], p.inside)
            after, move = mine.after[p.inside], None
            if self.dense is not None:
                theirs = self._seen(self.before, i, self.dense[rows], None if ends else p.inside)
                if ends:
                    self.dense[rows] = theirs.out
                after = theirs.after[p.inside]
                if self.adds:
                    move = after - mine.after[p.inside]
                else:
                    move = theirs.y[p.inside] - mine.y[p.inside]
            add_in_turn(stats, rows, mine.x[p.inside], move, token_weights(after, relative))
        if processes.count() > 1:
            for sums in stats:
                sums.add_up()
        self.passed = ends and self.dense is not None
        return stats

    def _seen(self, module: nn.Module, batch: int, x: Tensor, last: str | None) -> Seen:
        return forward_until(self.feed, module, self.block, batch, x, self.names, last=last)

    def advance(self, module: nn.Module) -> None:
        """Bring both streams to the next block."""
        with turn(module):
            for i, rows in enumerate(self.feed.rows):
                self.own[rows] = self.feed.forward(module, self.block, i, self.own[rows])
                if self.dense is None or self.passed:
                    continue
                self.dense[rows] = self.feed.forward(self.before, self.block, i, self.dense[rows])
