"""Dynamic batch loading (Sheared LLaMA, arXiv 2310.06694, algorithm 1): text of several domains,
more of those whose loss is furthest above where it should be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from prunekit.data.training_examples import Example

UNIFORM = 1e-4
"""Share of equal weights that is mixed in, so that no domain is lost."""


def updated(weights: Mapping[str, float], excess: Mapping[str, float]) -> dict[str, float]:
    """`softmax(log w + excess)`, with `UNIFORM` of equal weights; `excess`: loss less reference."""
    highest = max(excess.values())
    raw = {name: w * math.exp(excess[name] - highest) for name, w in weights.items()}
    total = sum(raw.values())
    return {n: (1 - UNIFORM) * w / total + UNIFORM / len(raw) for n, w in raw.items()}


class DomainExamples(Sequence[Example]):
    """Examples drawn domain by domain, whatever index is asked for.

    Every `every` examples the domains' losses are measured, and their weights follow.
    """

    def __init__(
        self,
        domains: Mapping[str, Sequence[Example]],
        losses: Callable[[], dict[str, float]],
        reference: Mapping[str, float],
        every: int,
        seed: int,
    ):
        self.domains = {name: list(of) for name, of in domains.items()}
        self.losses, self.reference, self.every, self.seed = losses, reference, every, seed
        total = len(self)
        self.history = [{name: len(of) / total for name, of in self.domains.items()}]
        self._begin()

    def _begin(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.drawn = 0
        self._order: dict[str, list[int]] = {name: [] for name in self.domains}

    def __len__(self) -> int:
        return sum(len(of) for of in self.domains.values())

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]  # no slices
        names, times = list(self.domains), self.drawn // self.every
        if len(names) == 1:
            times = 0
        elif times == len(self.history):
            found = self.losses()
            excess = {name: found[name] - self.reference[name] for name in names}
            self.history.append(updated(self.history[-1], excess))
        self.drawn += 1
        chances = torch.tensor([self.history[times][name] for name in names])
        name = names[int(torch.multinomial(chances, 1, generator=self.generator))]
        if not self._order[name]:
            self._order[name] = torch.randperm(
                len(self.domains[name]), generator=self.generator
            ).tolist()
        return self.domains[name][self._order[name].pop()]

    def state(self) -> dict[str, Tensor]:
        """All weights so far, from which the draws follow."""
        rows = [[weights[name] for name in self.domains] for weights in self.history]
        return {"history": torch.tensor(rows, dtype=torch.float64)}

    def go_on(self, state: Mapping[str, Tensor], examples: int) -> None:
        """Draws anew what had been learnt from. More may have been drawn ahead, and weights may be
        known by which nothing was drawn yet: they are taken when it is their turn.
        """
        rows = state["history"].tolist()
        self.history = [dict(zip(self.domains, row, strict=True)) for row in rows]
        self._begin()
        for _ in range(examples):
            self[0]
