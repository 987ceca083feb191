"""Which experts of a layer can go together: sets of them are taken out of the routing, and the
layer's output on the calibration text is compared with what it was.
"""

from __future__ import annotations

import itertools
import math
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from prunekit.activations.blockwise import BlockRun
from prunekit.activations.hooks import first_tensor
from prunekit.activations.storage import autocast
from prunekit.graph.discovery import Discovery
from prunekit.graph.expert_neurons import around, module_around
from prunekit.graph.gated import gated
from prunekit.types import Group, tensor_of


class Found(NamedTuple):
    """A (U,) mask of the experts that stay, the loss with it, and how many sets were tried."""

    mask: Tensor
    loss: float
    tried: int


class ExpertLayer:
    """One router with its experts, and what the innermost module around them that is called gets
    and puts out on the text of a block.

    Attributes:
        calls: the arguments of each batch.
        outputs: of each batch, one row a sample.
        z: (U,) experts at 0 cannot be picked, inside `gates`.
    """

    def __init__(self, model: nn.Module, group: Group, run: BlockRun, known: Discovery):
        self.model, self.group, self.run, self.known = model, group, run, known
        self.module: nn.Module | None = None
        self.device = tensor_of(model, group.members[0].param).device
        self.calls: list[tuple[Any, Any]] = []
        self.outputs: list[Tensor] = []
        self.z = torch.ones(group.units, device=self.device)
        hooks = [
            model.get_submodule(path).register_forward_hook(self._keep, with_kwargs=True)
            for path in around(module_around(group))
        ]
        try:
            for _ in run.forward():
                pass
        finally:
            for hook in hooks:
                hook.remove()

    def _keep(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.module is None:
            self.module = module
        if module is not self.module:
            return
        self.calls.append((args, kwargs))
        self.outputs.append(first_tensor(output))

    def gates(self) -> AbstractContextManager[nn.Module]:
        """A context in which `loss` can be asked."""
        return gated(self.model, [self.group], {self.group.name: self.z}, self.known)

    def loss(self, gone: tuple[int, ...]) -> float:
        """Sum over samples of the norm of what the output changes by without these experts."""
        self.z.fill_(1)
        self.z[list(gone)] = 0
        assert self.module is not None
        total = torch.zeros((), device=self.device)
        rows = self.run.feed.rows
        with autocast(self.run.feed.precision, self.device):
            for (args, kwargs), before, part in zip(self.calls, self.outputs, rows, strict=True):
                off = first_tensor(self.module(*args, **kwargs)).float() - before.float()
                total += off.reshape(part.stop - part.start, -1).norm(dim=1).sum()
        return float(total)


@torch.no_grad()
def search(layer: ExpertLayer, count: int, limit: int) -> Found:
    """The `count` experts without which the output changes least: of all sets where there are no
    more than `limit`, else one after the other, each time the one whose loss is least.
    """
    units = layer.group.units
    total = math.comb(units, count)
    with layer.gates():
        if total <= limit:
            sets = itertools.combinations(range(units), count)
            bar = tqdm(sets, desc="sets of experts", unit="set", total=total, delay=2)
            losses = {gone: layer.loss(gone) for gone in bar}
            best = min(losses, key=lambda gone: losses[gone])
            return Found(_mask(units, best), losses[best], len(losses))
        taken: tuple[int, ...] = ()
        tried, least = 0, 0.0
        for _ in tqdm(range(count), desc="experts", unit="expert", delay=2):
            left = [u for u in range(units) if u not in taken]
            now = {u: layer.loss((*taken, u)) for u in left}
            nxt = min(now, key=lambda u: now[u])
            taken, least, tried = (*taken, nxt), now[nxt], tried + len(now)
    return Found(_mask(units, taken), least, tried)


def _mask(units: int, gone: tuple[int, ...]) -> Tensor:
    mask = torch.ones(units, dtype=torch.bool)
    mask[list(gone)] = False
    return mask
