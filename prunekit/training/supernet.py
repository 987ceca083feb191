"""A network whose sub-networks are trained together, on the weights that they share: the sandwich
rule with in-place distillation (Yu et al., 2019, arXiv 1903.05134).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prunekit import graph
from prunekit.data.training_examples import Example
from prunekit.training.distillation import Distillation, said_by
from prunekit.training.low_rank import Updates, low_rank_updates
from prunekit.training.masks_and_updates import gates_around_updates
from prunekit.training.recipe import Recipe
from prunekit.training.weights import in_float32
from prunekit.types import Group, Kept


class Supernet:
    """A model that runs as any of its sub-networks.

    `cycle` says which, one after the other, read the micro-batches of a step in train mode; in eval
    mode it is the one that was `set` last. Before each forward in train mode the whole network
    reads the same, whose logits are the teacher's.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group], cycle: Callable[[int], Kept]):
        device = next(model.parameters()).device
        self.model, self.groups, self.cycle = model, list(groups), cycle
        self.z = {g.name: torch.ones(g.units, device=device) for g in groups}
        self.read = 0
        self._teaching = False
        self._logits: Tensor | None = None

    @torch.no_grad()
    def set(self, kept: Kept | None) -> None:
        """The sub-network that reads from now on; None is the whole network."""
        for name, z in self.z.items():
            z.copy_(torch.ones_like(z) if kept is None else kept[name].to(z))

    @contextmanager
    def on_model(self) -> Iterator[None]:
        """Inside, the model is one of its sub-networks."""
        hook = self.model.register_forward_pre_hook(self._next, with_kwargs=True, prepend=True)
        try:
            with graph.gated(self.model, self.groups, self.z):
                yield
        finally:
            hook.remove()
            self.set(None)

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """(N, T, V) of the whole network for the batch that was read last."""
        assert self._logits is not None
        return self._logits

    def state(self) -> dict[str, Tensor]:
        """How many micro-batches were read."""
        return {"read": torch.tensor(self.read)}

    def go_on(self, state: Mapping[str, Tensor], examples: int) -> None:
        self.read = int(state["read"])

    def _next(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not model.training or self._teaching:
            return
        self._teaching = True
        self.set(None)
        model.eval()
        self._logits = said_by(model, kwargs).logits
        model.train()
        self._teaching = False
        self.set(self.cycle(self.read))
        self.read += 1


def train_supernet(
    net: Supernet,
    updates: Updates | None,
    examples: Sequence[Example],
    recipe: Recipe,
    weight: float,
) -> list[dict[str, Any]]:
    """Trains all weights, or low-rank updates that are merged at the end. Returns the curve.

    weight: of the KL to the whole network in the loss; the rest is the text's.
    """
    from prunekit.training.trainer import train

    model = net.model
    learning = low_rank_updates(model, updates, recipe.seed) if updates else in_float32(model)
    with net.on_model(), learning:
        if updates:
            gates_around_updates(model)
        else:
            model.requires_grad_(True)
        how = Distillation(weight)
        history = train(model, examples, recipe, teacher=net.logits, distillation=how, beside=[net])
    return history.curve
