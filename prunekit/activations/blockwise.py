"""The pass block by block: every decoder block run on inputs that are kept from the block before,
so that one block is at work at a time.

`iterate_blocks` goes through the blocks, each of which a `BlockRun` replays.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from prunekit.activations.block_inputs import BlockInputs, capture_inputs
from prunekit.activations.done_blocks import DoneBlocks, Outcome
from prunekit.activations.storage import Activations, PassOptions
from prunekit.architecture.streaming import turn
from prunekit.errors import ConfigError
from prunekit.types import Counts, Group

log = logging.getLogger("prunekit")


class BlockRun:
    """A `Run` over one block on its cached inputs, for criteria that watch what happens inside.

    `tokens` is `(N, T)`; the batches are those in which the inputs were captured.
    """

    def __init__(
        self,
        model: nn.Module,
        tokens: Tensor,
        feed: BlockInputs,
        block: int,
        inputs: Activations,
        done: DoneBlocks | None = None,
    ):
        self.model, self.tokens = model, tokens
        self.feed, self.block, self.inputs, self.done = feed, block, inputs, done
        self.batches = range(len(feed.rows))
        self.counts: Counts = {}
        self.statistics: dict[Any, Any] = {}
        self.left: Activations | None = None
        """What the block puts out as the caller leaves it, where the caller has that already."""

    @property
    def module(self) -> nn.Module:
        """The block, as it is now."""
        return self.model.get_submodule(self.feed.blocks[self.block])

    def outputs(self) -> Iterator[tuple[slice, Tensor]]:
        """What the block puts out, as it is now, and the samples that it is of."""
        for i in self.batches:
            rows = self.feed.rows[i]
            yield rows, self.feed.forward(self.module, self.block, i, self.inputs[rows])

    def once(self, compute: Callable[[], Outcome], changes: Sequence[str] = ()) -> Outcome:
        """What `compute` gives, which may change no tensor of the model but those called `changes`;
        where the same pass was cut off after this block, what it gave then.
        """
        if self.done is None:
            return compute()
        return self.done.once(self.model, self.block, compute, changes)

    def part(self, number: int, of: int) -> BlockRun:
        """A run over every batch number `number` of `of`; `tokens` remain those of all."""
        run = BlockRun(self.model, self.tokens, self.feed, self.block, self.inputs)
        run.batches = self.batches[number::of]
        return run

    def forward(self) -> Iterator[int]:
        for _, out in self.outputs():
            yield len(out)

    def losses(self, batch: int | None = None) -> Iterator[Any]:
        raise ConfigError(
            "a criterion that needs the loss cannot score one block alone: take pruner=oneshot, "
            "or another criterion"
        )


@torch.no_grad()
def iterate_blocks(
    model: nn.Module,
    blocks: tuple[str, ...],
    tokens: Tensor,
    options: PassOptions,
    done: DoneBlocks | None = None,
) -> Iterator[BlockRun]:
    """One BlockRun after the other; what the caller does to a block in between, the next block sees
    in its inputs. `done`: keeps what the caller's `once` gives, and knows what it gave.
    """
    inputs, feed = capture_inputs(model, blocks, tokens, options)
    start = done.begin(feed.rows, inputs) if done else 0
    for b in tqdm(range(len(blocks)), desc="blocks", unit="block", delay=2):
        run = BlockRun(model, tokens, feed, b, inputs, done)
        with turn(run.module):
            yield run
            if start <= b < len(blocks) - 1:
                left = run.left
                known = left and ((rows, left[rows]) for rows in feed.rows)
                for rows, out in known or run.outputs():
                    inputs[rows] = out
        if done and start <= b < len(blocks) - 1:
            done.advance(model, b + 1, feed.rows, inputs)


def groups_by_block(groups: list[Group], blocks: tuple[str, ...]) -> list[list[Group]]:
    """The groups of each block. Raises ConfigError for one that is not inside a single block."""
    rows: list[list[Group]] = [[] for _ in blocks]
    for g in groups:
        homes = {
            next((i for i, b in enumerate(blocks) if name.startswith(b + ".")), None)
            for name in ([g.matrix] if g.matrix else [m.param for m in g.members])
        }
        home = homes.pop() if len(homes) == 1 else None
        if home is None:
            raise ConfigError(
                f"{g.name} is not inside one block, so it cannot be pruned block by block: narrow "
                "pruner.kinds"
            )
        rows[home].append(g)
    return rows
