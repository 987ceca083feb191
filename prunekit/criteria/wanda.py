"""Wanda (Sun et al., ICLR 2024, arXiv 2306.11695): a weight matters as much as it is large and as
what it reads is large.
"""

from __future__ import annotations

import torch
from torch import nn

from prunekit.architecture.matrices import matrix, to_out_in
from prunekit.registry import criteria
from prunekit.scoring.wanda import input_norms, wanda_score
from prunekit.types import Group, Run, Scores


@criteria.register(paper="arXiv 2306.11695", year=2023, needs="data", kinds=("weights",))
@torch.no_grad()
def wanda(model: nn.Module, groups: list[Group], run: Run) -> Scores:
    """A weight's size times the norm of its input over the calibration text; the paper compares
    within rows (pruner.scope=row, or alpha).
    """
    norms = input_norms(model, groups, run)
    return {
        g.name: to_out_in(model, g, wanda_score(matrix(model, g), norms[g.name])) for g in groups
    }
