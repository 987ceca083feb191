"""AIMER (arXiv 2603.18492): experts whose weights are spread evenly go first; no data."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from prunekit.graph.expert_neurons import expert_slabs
from prunekit.registry import criteria
from prunekit.scoring.experts import check_experts
from prunekit.types import Group, Run, Scores, tensor_of


@criteria.register(paper="arXiv 2603.18492", year=2026, needs="-", kinds=("experts",))
@torch.no_grad()
def aimer(model: nn.Module, groups: list[Group], run: Run) -> Scores:
    """Minus the mean size of an expert's weights over their root mean square, which lies in (0, 1]
    and is 1 where all are of one size.

    Read off the matrices of the experts alone, fused or listed, not off the router. Raises
    ConfigError for units that are no experts.
    """
    check_experts(groups)
    scores = {}
    for g in groups:
        count = torch.zeros(g.units, dtype=torch.float64)
        sums: list[Tensor] = []
        experts: list[int] = []
        for u, weight in expert_weights(model, g):
            w = weight.detach().float()
            sums.append(torch.stack([w.abs().sum(), w.square().sum()]).double())
            experts.append(u)
            count[u] += w.numel()
        both = torch.stack([x.to(sums[0].device) for x in sums], 1).cpu()  # the only wait
        total, squares = torch.zeros(2, g.units, dtype=torch.float64).index_add_(
            1, torch.tensor(experts), both
        )
        spread = total / count / (squares / count).sqrt()
        # Zeros are all of one size too.
        scores[g.name] = -torch.where(squares == 0, 1.0, spread).float()
    return scores


def expert_weights(model: nn.Module, group: Group) -> Iterator[tuple[int, Tensor]]:
    """The matrices of each expert with its number: slices of fused ones, or those of its module."""
    for m in expert_slabs(model, group):
        weight = tensor_of(model, m.param)
        for u in range(group.units):
            yield u, weight.index_select(m.axis, m.index[u].to(weight.device))
    for u, path in enumerate(group.modules):
        for p in model.get_submodule(path).parameters():
            if p.dim() > 1:
                yield u, p
