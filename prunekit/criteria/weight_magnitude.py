"""|w| of each single weight: the baseline of the Wanda and SparseGPT tables."""

from __future__ import annotations

import torch
from torch import nn

from prunekit.registry import criteria
from prunekit.types import Group, Run, Scores, tensor_of


@criteria.register(paper="arXiv 1506.02626", year=2015, needs="-", kinds=("weights",))
@torch.no_grad()
def weight_magnitude(model: nn.Module, groups: list[Group], run: Run) -> Scores:
    """The size of each single weight."""
    return {g.name: tensor_of(model, g.members[0].param).detach().float().abs() for g in groups}
