"""Which input channels of a linear module may stand in another order at no cost, because what makes
them can put them out in that order: found by discovery, proven on what the module puts out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from prunekit import graph
from prunekit.activations.hooks import hook_activations, raise_stop, stop_early
from prunekit.architecture.linear import makes, readers
from prunekit.architecture.matrices import shared_parameters
from prunekit.types import Group, Member, Run, tensor_of

TRIALS = 12
"""Ways of moving a head's channels that are tried; the first three are right wherever any is."""
AGREES = 0.1
"""Relative change of what the reader puts out. Rounding of bfloat16 moves it by 0.01, channels that
do not belong together by about 1.
"""


class FreeChannels(NamedTuple):
    """Channels that may change places among themselves.

    read: (D, copies) inputs of the reader; all copies of a channel move together.
    members: every tensor that has slices of the channels, the reader's weight included; `index`
        is (D, width).
    """

    read: Tensor
    members: tuple[Member, ...]


@torch.no_grad()
def reorder(model: nn.Module, channels: FreeChannels, order: Tensor) -> None:
    """Let channel `order[k]` stand where channel k stood, in every tensor."""
    for m in channels.members:
        reorder_along(tensor_of(model, m.param), m, order)


@torch.no_grad()
def reorder_along(x: Tensor, member: Member, order: Tensor) -> None:
    """The same in `x`, which is stored like the member's tensor."""
    index, order = member.index.to(x.device), order.to(x.device)
    x.index_copy_(member.axis, index.flatten(), x.index_select(member.axis, index[order].flatten()))


class FreeReaders:
    """Finds the free channels of readers, and remembers the way that was proven in one block for
    the modules of the same name in the others. `shared` are the ids of parameters that several
    modules use: what they make or read cannot be moved in one place alone.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.shared = shared_parameters(model)
        self.groups: dict[str, Group] = {}
        for g in graph.discover(model, verify=False):
            found = readers(model, g) if g.kind in ("neurons", "heads") else []
            alone = not any(id(tensor_of(model, m.param)) in self.shared for m in g.members)
            if len(found) == 1 and alone:
                self.groups[found[0].name] = g
        self.proven: dict[tuple[str, ...], int | None] = {}

    def of(self, reader: str, run: Run, multiple: int) -> list[FreeChannels]:
        """Sets of free channels that make up all inputs of the module `reader`, each of them runs
        of a multiple of `multiple` adjacent inputs; nothing where discovery has none, or where
        moving them changes what the module puts out.
        """
        group = self.groups.get(reader)
        if group is None:
            return []
        ways = list(_ways(self.model, group, reader, multiple))[:TRIALS]
        key = _shape_of(reader, ways)
        if key not in self.proven:
            tried = (i for i, way in enumerate(ways) if self._holds(reader, way, run))
            self.proven[key] = next(tried, None)
        chosen = self.proven[key]
        return [] if chosen is None else ways[chosen]

    def _holds(self, reader: str, way: list[FreeChannels], run: Run) -> bool:
        before = _output(reader, run)
        flips = [torch.arange(len(c.read)).flip(0) for c in way]
        for c, flip in zip(way, flips, strict=True):
            reorder(self.model, c, flip)
        after = _output(reader, run)
        for c, flip in zip(way, flips, strict=True):
            reorder(self.model, c, flip)
        return bool((after - before).norm() <= AGREES * before.norm())


def _shape_of(reader: str, ways: list[list[FreeChannels]]) -> tuple[str, ...]:
    """What modules at the same place of other blocks share: names without numbers, and sizes."""
    names = [".".join(p for p in reader.split(".") if not p.isdigit())]
    return (*names, *(f"{len(w)}x{tuple(w[0].read.shape)}" for w in ways))


@torch.no_grad()
def _output(reader: str, run: Run) -> Tensor:
    """What the module puts out for the first batch."""
    seen: list[Tensor] = []

    def take(x: Tensor) -> None:
        seen.append(x.float().clone())
        raise_stop()

    with stop_early(), hook_activations(run.model, outputs={reader: take}):
        next(iter(run.forward()))
    return seen[0]


def _ways(
    model: nn.Module, group: Group, reader: str, multiple: int
) -> Iterator[list[FreeChannels]]:
    """Candidate sets of free channels that cover the reader's inputs, the likeliest first."""
    read = next(m for m in group.members if m.param == f"{reader}.weight")
    inputs = tensor_of(model, read.param).shape[read.axis]
    if read.index.numel() != inputs:
        return
    if group.kind == "neurons":
        if _in_runs(read.index, multiple):
            yield [FreeChannels(read.index, group.members)]
        return
    width = read.index.shape[1]
    makers = [m for m in group.members if m is not read and makes(model, m)]
    sizes = {d for m in makers for d in range(multiple, width + 1) if m.width % d == 0}
    for size in sorted((d for d in sizes if width % d == 0 and d % multiple == 0), reverse=True):
        for maker in reversed(makers):
            for part in reversed(range(maker.width // size if maker.width % size == 0 else 0)):
                way = [_inside(group, u, read, maker, part, size) for u in range(group.units)]
                if all(_in_runs(c.read, multiple) for c in way):
                    yield way


def _inside(
    group: Group, unit: int, read: Member, maker: Member, part: int, size: int
) -> FreeChannels:
    """The channels of one head: part number `part` of what the maker makes for it, and the copies
    of them that the reader reads.
    """
    copies = read.index[unit].view(-1, size).T
    module = maker.param.rpartition(".")[0]
    made = [
        Member(m.param, m.axis, m.index[unit, part * size : (part + 1) * size, None])
        for m in group.members
        if m.param.rpartition(".")[0] == module and m.width == maker.width
    ]
    return FreeChannels(copies, (*made, Member(read.param, read.axis, copies)))


def _in_runs(read: Tensor, multiple: int) -> bool:
    """Whether each copy of the channels is adjacent inputs that start and end where runs do."""
    adjacent = (read.diff(dim=0) == 1).all()
    return bool(adjacent and len(read) % multiple == 0 and (read[0] % multiple == 0).all())
