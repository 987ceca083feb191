"""RIA (Zhang et al., ICLR 2024, "Plug-and-Play"): a weight matters as much as it makes up of its
row and its column, and as what it reads is large.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from prunekit.architecture.matrices import matrix, to_out_in
from prunekit.registry import criteria
from prunekit.scoring.ria import ria_score
from prunekit.scoring.wanda import input_norms
from prunekit.types import Group, Run, Scores


@criteria.register(paper="Plug-and-Play (ICLR)", year=2024, needs="data", kinds=("weights",))
@torch.no_grad()
def ria(
    model: nn.Module, groups: list[Group], run: Run, *, a: Annotated[float, Field(ge=0)] = 0.5
) -> Scores:
    """A weight's share of its row plus its share of its column, times the norm of its input to the
    power `a`.

    The paper compares within matrices (pruner.scope=matrix), within rows as an option, and in N:M
    (with channel permutation: pruner.permute=true).
    """
    norms = input_norms(model, groups, run)
    return {
        g.name: to_out_in(model, g, ria_score(matrix(model, g), norms[g.name], a)) for g in groups
    }
