"""A database of local solutions: every part of a model solved by itself at a few levels, on the
dense network (the database as in EvoPress, arXiv 2410.14649).

Of a level only what differs from the dense model is kept. Each part is an entry of the cache of its
own, so that a run that was cut off goes on with the next one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from prunekit.activations.dense_stream import DenseStream
from prunekit.activations.storage import PassOptions
from prunekit.architecture.mapped import beside, mapped_copy, release
from prunekit.data.files import cache_limit
from prunekit.types import Counts, Group, Remember, SubLayer

SMALL = 2**16
"""Bytes of a tensor that stays in memory whatever `store` says."""


@dataclass(kw_only=True)
class LevelDatabase(ABC):
    """`types.LocalSolutions`, solved when first asked for; a kind of database says what a solution
    is and how the model gets it.

    Attributes:
        tokens: the calibration text; raises NeedsData where only shapes are known.
        options: of the pass through the dense blocks; with store=disk solutions wait in files too.
        solved: by group, with `removed` and `errors` as in SubLayer.
    """

    model: nn.Module
    blocks: tuple[str, ...]
    tokens: Callable[[], Tensor]
    options: PassOptions
    remember: Remember
    solved: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @property
    @abstractmethod
    def key(self) -> list[Any]:
        """As in `types.LocalSolutions`."""

    @property
    @abstractmethod
    def places(self) -> Sequence[tuple[int, Group]]:
        """What is solved, with the number of its block, in the order of the forward pass."""

    @abstractmethod
    def most(self, group: Group) -> int:
        """As in `types.LocalSolutions`."""

    @abstractmethod
    def solution(self, dense: DenseStream, block: int, group: Group) -> dict[str, Tensor]:
        """All levels of one group of a block."""

    @abstractmethod
    def cost(self, group: Group, removed: int) -> float:
        """As in `types.SubLayer`."""

    @abstractmethod
    def write(self, group: Group, removed: int) -> None:
        """Give a dense group the weights of a level; its shapes stay."""

    @abstractmethod
    def weight(self, group: Group) -> Tensor:
        """What a solution replaces."""

    def restorer(self, group: Group) -> Callable[[], None]:
        """A function that gives a group the weights which it has now."""
        weight, before = self.weight(group).detach(), self.aside(group)

        def restore() -> None:
            weight.copy_(before)
            release([before])

        return restore

    @cached_property
    def sublayers(self) -> list[SubLayer]:
        self.solve()
        return [
            SubLayer(
                g,
                tuple(self.solved[g.name]["removed"].tolist()),
                tuple(self.solved[g.name]["errors"].tolist()),
                partial(self.cost, g),
            )
            for _, g in self.places
        ]

    @torch.no_grad()
    def solve(self) -> None:
        """Solves what is not solved yet. Raises NeedsData where only shapes are known."""
        if len(self.solved) == len(self.places):
            return
        self.tokens()  # where only shapes are known, this says so
        dense = DenseStream(self.model, self.blocks, self.tokens, self.options)
        for b, g in tqdm(self.places, desc="local solutions", unit="part"):
            compute = partial(self.solution, dense, b, g)
            module = type(self).__module__
            found = self.remember(module, f"solutions/{g.name}", self.key, compute)
            weight = self.weight(g)
            self.solved[g.name] = {
                name: self._resting(part, weight) if part.nbytes > SMALL else part
                for name, part in found.items()
            }

    def _resting(self, part: Tensor, weight: Tensor) -> Tensor:
        """In a file, where that was asked for or the weight is in one; not on a device that the
        weight only visits.
        """
        if self.options.store == "disk":
            return mapped_copy(part)
        return beside(part.cpu() if weight.device.type == "cpu" else part, weight)

    def aside(self, group: Group) -> Tensor:
        """A copy of a group's weight, where solutions wait."""
        weight = self.weight(group).detach()
        return self._resting(weight.clone(), weight)

    @abstractmethod
    def bytes(self) -> int:
        """Of all levels, from shapes alone."""

    def remark(self) -> str:
        """What `plan` says of the size."""
        size, kept = self.bytes(), cache_limit()
        on_disk = self.options.store == "disk"
        where = "on disk" if on_disk else "in memory, or with pruner.store=disk on disk"
        said = f"All levels together take {size / 2**20:,.1f} MiB {where}."
        if size > kept:
            said += (
                f" The cache keeps the last {kept / 2**30:,.4g} GiB of them for other runs: "
                "PRUNEKIT_CACHE_GIB=N raises that."
            )
        return said

    @contextmanager
    def assembled(self) -> Iterator[Callable[[Sequence[int]], None]]:
        sublayers = self.sublayers
        standing = [0] * len(sublayers)
        restore = [self.restorer(s.group) for s in sublayers]

        @torch.no_grad()
        def put(levels: Sequence[int]) -> None:
            for i, (s, level) in enumerate(zip(sublayers, levels, strict=True)):
                if level != standing[i]:
                    restore[i]()
                    self.write(s.group, s.removed[level])
                    standing[i] = level

        try:
            yield put
        finally:
            put([0] * len(standing))

    def at_levels(self, counts: Counts) -> Counts:
        """`counts`, each brought down to a level."""
        at = {s.group.name: s.removed for s in self.sublayers}
        return {name: max(n for n in at[name] if n <= count) for name, count in counts.items()}
