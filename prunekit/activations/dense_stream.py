"""The text on its way through the dense blocks, for what is solved of them one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from prunekit.activations.block_inputs import capture_inputs
from prunekit.activations.blockwise import BlockRun
from prunekit.activations.storage import PassOptions
from prunekit.architecture.streaming import turn


@dataclass
class DenseStream:
    """A block is reached when it is asked for; `tokens` are read then."""

    model: nn.Module
    blocks: tuple[str, ...]
    tokens: Callable[[], Tensor]
    options: PassOptions
    held: BlockRun | None = None

    def run(self, block: int) -> BlockRun:
        """Over block number `block`, on what the blocks before it put out; blocks are asked for in
        ascending order.
        """
        at = self.held
        if at is None:
            tokens = self.tokens()
            inputs, feed = capture_inputs(self.model, self.blocks, tokens, self.options)
            at = BlockRun(self.model, tokens, feed, 0, inputs)
        while at.block < block:
            with turn(at.module):
                for rows, out in at.outputs():
                    at.inputs[rows] = out
            at = BlockRun(self.model, at.tokens, at.feed, at.block + 1, at.inputs)
        self.held = at
        return at
