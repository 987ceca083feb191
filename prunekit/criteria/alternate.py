"""Every other block goes: how DistilBERT's student starts (Sanh et al. 2019, arXiv 1910.01108,
section 3), the rival of LLM-Pruner's Table 8.
"""

from __future__ import annotations

import torch
from torch import nn

from prunekit.registry import criteria
from prunekit.types import Group, Run, Scores


@criteria.register(paper="arXiv 1910.01108", year=2019, needs="-", kinds=("blocks",))
def alternate(model: nn.Module, groups: list[Group], run: Run) -> Scores:
    """Odd blocks score lower than even ones, and among equals the later ones: half of the blocks
    removed is every other block.
    """
    scores = {}
    for g in groups:
        place = torch.arange(g.units, dtype=torch.float32)
        scores[g.name] = (place % 2 == 0).float() * (g.units + 1) - place
    return scores
