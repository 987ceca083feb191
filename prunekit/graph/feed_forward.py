"""Feed-forward blocks: which linear modules make the neurons, which one reads them, and what
happens between, found by following a forward pass and never by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunekit.architecture.linear import is_linear, makes, weight_of
from prunekit.errors import ConfigError
from prunekit.graph.replay import Replay
from prunekit.types import Group


@dataclass(frozen=True, eq=False)
class Rows:
    """Outputs of a linear module, one a neuron: `index (F,)`."""

    module: str
    index: Tensor


@dataclass(frozen=True)
class FeedForward:
    """A block of `F` neurons: one or two sets of linear outputs make them, one linear module reads
    them as its inputs `columns (F,)`.
    """

    name: str
    layer: int | None
    makers: tuple[Rows, ...]
    reader: str
    columns: Tensor

    @property
    def modules(self) -> set[str]:
        return {rows.module for rows in self.makers} | {self.reader}


def feed_forwards(model: nn.Module, groups: Iterable[Group]) -> list[FeedForward]:
    """The feed-forward blocks of linear modules among `groups`; experts that are stacked in one
    tensor are none.
    """
    found = []
    for g in groups:
        if g.kind != "neurons":
            continue
        makers, readers = [], []
        for m in g.members:
            module, _, leaf = m.param.rpartition(".")
            if leaf == "bias":
                continue
            if not (leaf == "weight" and is_linear(model.get_submodule(module))):
                break
            if makes(model, m):
                makers += [Rows(module, index) for index in m.index.unbind(1)]
            else:
                readers.append((module, m.index))
        else:
            if len(makers) in (1, 2) and len(readers) == 1 and readers[0][1].shape[1] == 1:
                (reader, columns), rows = readers[0], tuple(makers)
                found.append(FeedForward(g.name, g.layer, rows, reader, columns[:, 0]))
    return found


@dataclass(frozen=True)
class Neurons:
    """How a block's neurons come about: `act(z)`, or `act(s) z` behind a gate.

    act: elementwise and differentiable, `(T, F)` to `(T, F)`.
    """

    up: Rows
    gate: Rows | None
    act: Callable[[Tensor], Tensor]


@torch.no_grad()
def neurons_of(model: nn.Module, block: FeedForward, replay: Replay) -> Neurons:
    """Which of the makers is the gate, and the activation, by trying what was recorded.

    Raises ConfigError where the neurons are no elementwise function of one maker, nor one of them
    times the other.
    """
    matrices = {rows.module: weight_of(model.get_submodule(rows.module)) for rows in block.makers}

    def run(values: dict[int, Tensor]) -> Tensor:
        outputs: dict[str, Tensor] = {}
        for i, rows in enumerate(block.makers):
            full = outputs.get(rows.module)
            if full is None:
                full = values[i].new_zeros(len(values[i]), len(matrices[rows.module]))
            outputs[rows.module] = full.index_copy(1, rows.index.to(full.device), values[i])
        return replay(outputs)[:, block.columns]

    def plain(z: Tensor) -> Tensor:
        return run({0: z})

    if len(block.makers) == 1 and _elementwise(plain, *_samples(block, matrices)):
        return Neurons(block.makers[0], None, plain)
    for gate, up in ((0, 1), (1, 0)) if len(block.makers) == 2 else ():

        def act(s: Tensor, gate: int = gate, up: int = up) -> Tensor:
            return run({gate: s, up: torch.ones_like(s)})

        s, z = _samples(block, matrices)
        product = run({gate: s, up: z})
        if torch.allclose(product, act(s) * z, rtol=1e-3) and _elementwise(act, s, z):
            return Neurons(block.makers[up], block.makers[gate], act)
    raise ConfigError(
        f"{block.name}: between {', '.join(sorted(matrices))} and {block.reader} there is more "
        "than an activation, or an activation times a linear map"
    )


def _samples(block: FeedForward, matrices: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Two tensors `(16, F)` to try a function on."""
    like = next(iter(matrices.values()))
    rng = torch.Generator().manual_seed(0)
    a, b = (2 * torch.randn(2, 16, len(block.columns), generator=rng)).to(like.device)
    return a, b


def _elementwise(function: Callable[[Tensor], Tensor], a: Tensor, b: Tensor) -> bool:
    """Whether an element of the result comes from the same element of the argument alone."""
    choice = torch.arange(a.numel(), device=a.device).view(a.shape) % 3 == 0
    mixed = function(torch.where(choice, a, b))
    return torch.allclose(mixed, torch.where(choice, function(a), function(b)), rtol=1e-4)
