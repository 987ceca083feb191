"""What a pass by blocks has done so far, kept as it goes: the same pass, cut off and begun again,
goes on with the block at which it was.

Kept are what came of each block, the tensors that changed in it, and the inputs of the next block.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from prunekit.activations.storage import Activations
from prunekit.errors import ConfigError
from prunekit.types import Progress, tensor_of

log = logging.getLogger("prunekit")
SECONDS = 60.0
"""Between two times of writing: a short pass writes nothing, a long one loses no more than this."""
Outcome = dict[str, Tensor]
"""What came of a block, by names that `packed` gives."""


def packed(**parts: Mapping[str, Tensor | float]) -> Outcome:
    """Dictionaries of tensors and numbers as one."""
    return {
        f"{part}:{name}": value
        if isinstance(value, Tensor)
        else torch.tensor(value, dtype=torch.float64)
        for part, values in parts.items()
        for name, value in values.items()
    }


def unpacked(outcome: Outcome, part: str) -> dict[str, Tensor]:
    """One of the dictionaries that `packed` was given; its numbers are tensors."""
    start = f"{part}:"
    return {k.removeprefix(start): v for k, v in outcome.items() if k.startswith(start)}


class DoneBlocks:
    """`part(name)` says where the part of that name is kept. The inputs of a block are one stream
    of activations or several.
    """

    def __init__(self, part: Callable[[str], Progress]):
        self.part = part
        self.first = 0
        self.done: list[int] = []
        self.waiting: dict[int, tuple[Sequence[str], Outcome]] = {}
        self.written = time.monotonic()

    def begin(self, rows: Sequence[slice], *streams: Activations) -> int:
        """The block to go on with, with its inputs put into `streams`; 0 where nothing is kept, or
        a part of it is damaged.
        """
        position = self.part("position").read()
        if position is None:
            return 0
        first, done = int(position["first"]), position["done"].tolist()
        needed = [f"block-{b}" for b in done] + [f"inputs-{first}-{i}" for i in range(len(rows))]
        # All of them before one is used: a pass half put back could not begin anew.
        if any(self.part(name).read() is None for name in needed):
            return 0
        for i, samples in enumerate(rows):
            kept = self._read(f"inputs-{first}-{i}")
            for number, inputs in enumerate(streams):
                inputs[samples] = kept[str(number)]
        self.first, self.done = first, done
        log.info("%d blocks were done: going on with block %d", first, first)
        return first

    def once(
        self, model: nn.Module, block: int, compute: Callable[[], Outcome], changes: Sequence[str]
    ) -> Outcome:
        """What `compute` gives of a block, or gave before the pass was cut off; then the tensors
        of the model called `changes` get the values that it gave them.
        """
        if block >= self.first:
            outcome = compute()
            self.waiting[block] = (changes, outcome)
            return outcome
        return self.again(model, block)

    def again(self, model: nn.Module, block: int) -> Outcome:
        """What came of a block before `first`, whose tensors get the values that they had then."""
        found = self._read(f"block-{block}")
        for name, value in unpacked(found, "tensor").items():
            tensor_of(model, name).copy_(value)
        return unpacked(found, "outcome")

    def advance(
        self, model: nn.Module, block: int, rows: Sequence[slice], *streams: Activations
    ) -> None:
        """Takes note that `streams` are the inputs of block number `block`."""
        if block <= self.first or time.monotonic() - self.written < SECONDS:
            return
        for number, (changes, outcome) in self.waiting.items():
            tensors = {name: tensor_of(model, name) for name in changes}
            self.part(f"block-{number}").write(packed(outcome=outcome, tensor=tensors))
        for i, samples in enumerate(rows):
            kept = {str(number): inputs[samples] for number, inputs in enumerate(streams)}
            self.part(f"inputs-{block}-{i}").write(kept)
        self.done += self.waiting
        self.part("position").write(
            {"first": torch.tensor(block), "done": torch.tensor(self.done, dtype=torch.int64)}
        )
        for i in range(len(rows)):
            self.part(f"inputs-{self.first}-{i}").drop()
        self.first, self.waiting, self.written = block, {}, time.monotonic()

    def _read(self, name: str) -> dict[str, Tensor]:
        found = self.part(name).read()
        if found is None:
            raise ConfigError(f"{name} of the blocks done so far is gone: start the run again")
        return found
