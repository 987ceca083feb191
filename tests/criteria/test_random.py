"""Random scores: what a group draws depends on the seed and on its name alone."""

from __future__ import annotations

import torch

from prunekit.criteria.random import random_scores
from prunekit.types import Group

GROUPS = [Group(f"neurons.{i}", "neurons", i, 8) for i in range(3)]


def test_a_block_draws_the_same_alone_and_among_others():
    together = random_scores(None, GROUPS, None, seed=1)
    for g in GROUPS:
        assert torch.equal(random_scores(None, [g], None, seed=1)[g.name], together[g.name])


def test_blocks_and_seeds_draw_differently():
    first, second = (random_scores(None, GROUPS, None, seed=s) for s in (0, 1))
    drawn = [*first.values(), *second.values()]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    assert all(float(s.min()) > 0 and float(s.max()) < 1 for s in drawn)
