"""Uniform random scores: the floor that every criterion must beat."""

from __future__ import annotations

from zlib import crc32

import torch
from torch import nn

from prunekit.registry import Seed, criteria
from prunekit.types import KINDS, Group, Run, Scores


@criteria.register("random", paper="-", year=2023, needs="-", kinds=KINDS)
def random_scores(model: nn.Module, groups: list[Group], run: Run, *, seed: Seed = 0) -> Scores:
    """Uniform in (0, 1) per channel, summed over a unit, from a generator of its own.

    Each group has one, by its name: what a block draws does not depend on which groups are scored
    with it, and blocks that are scored one at a time do not all draw the same.
    """
    scores = {}
    for g in groups:
        generator = torch.Generator().manual_seed(crc32(f"{seed} {g.name}".encode()))
        scores[g.name] = torch.rand((*g.shape, g.width), generator=generator).sum(-1)
    return scores
