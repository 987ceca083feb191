"""Weight magnitude: the l1 and l2 baselines of LLM-Pruner's tables for structures, |w| for single
weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prunekit.registry import criteria
from prunekit.scoring.aggregate import Reduce, channel_sum, scored, unit_scores
from prunekit.types import STRUCTURES, Group, Run, Scores, tensor_of


@criteria.register(paper="arXiv 2305.11627", year=2023, needs="-", kinds=STRUCTURES)
def l1(model: nn.Module, groups: list[Group], run: Run, *, reduce: Reduce = "mean") -> Scores:
    """Sum of |w| over a unit's channels; members are averaged, as in LLM-Pruner."""
    return norm_scores(model, groups, 1, reduce)


@criteria.register(paper="arXiv 2305.11627", year=2023, needs="-", kinds=STRUCTURES)
def l2(model: nn.Module, groups: list[Group], run: Run, *, reduce: Reduce = "mean") -> Scores:
    """Sum of w^2 over a unit's channels (no root); members are averaged, as in LLM-Pruner."""
    return norm_scores(model, groups, 2, reduce)


@torch.no_grad()
def norm_scores(model: nn.Module, groups: list[Group], p: int, reduce: Reduce) -> Scores:
    """`sum |w|^p` per channel, folded to units."""
    per_channel: dict[tuple[str, int], Tensor] = {}
    for g in groups:
        for m in scored(g):
            if (m.param, m.axis) not in per_channel:
                per_channel[m.param, m.axis] = channel_sum(
                    tensor_of(model, m.param).float().abs() ** p, m.axis
                )
    return {g.name: unit_scores(g, per_channel, reduce) for g in groups}


@criteria.register(paper="arXiv 1506.02626", year=2015, needs="-", kinds=("weights",))
@torch.no_grad()
def weight_magnitude(model: nn.Module, groups: list[Group], run: Run) -> Scores:
    """The size of each single weight."""
    return {g.name: tensor_of(model, g.matrix).detach().float().abs() for g in groups}
