"""Uniform random scores: the floor that every criterion must beat."""

from __future__ import annotations

import torch
from torch import nn

from prunekit.registry import Seed, criteria
from prunekit.types import KINDS, Group, Run, Scores


@criteria.register("random", paper="-", year=2023, needs="-", kinds=KINDS)
def random_scores(model: nn.Module, groups: list[Group], run: Run, *, seed: Seed = 0) -> Scores:
    """Uniform in (0, 1) per channel, summed over a unit, from a generator of its own."""
    generator = torch.Generator().manual_seed(seed)
    return {g.name: torch.rand((*g.shape, g.width), generator=generator).sum(-1) for g in groups}
