"""Dynamic batch loading (Sheared LLaMA, arXiv 2310.06694, algorithm 1): text of several domains,
more of those whose loss is furthest above where it should be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

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
        self.losses, self.reference, self.every = losses, reference, every
        self.generator = torch.Generator().manual_seed(seed)
        total = len(self)
        self.weights = {name: len(of) / total for name, of in self.domains.items()}
        self.history = [self.weights]
        self.drawn = 0
        self._order: dict[str, list[int]] = {name: [] for name in self.domains}

    def __len__(self) -> int:
        return sum(len(of) for of in self.domains.values())

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]  # no slices
        if self.drawn and self.drawn % self.every == 0 and len(self.domains) > 1:
            found = self.losses()
            excess = {name: found[name] - self.reference[name] for name in self.domains}
            self.weights = updated(self.weights, excess)
            self.history.append(self.weights)
        self.drawn += 1
        names = list(self.domains)
        chances = torch.tensor([self.weights[name] for name in names])
        name = names[int(torch.multinomial(chances, 1, generator=self.generator))]
        if not self._order[name]:
            self._order[name] = torch.randperm(
                len(self.domains[name]), generator=self.generator
            ).tolist()
        return self.domains[name][self._order[name].pop()]
