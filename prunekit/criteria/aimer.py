"""AIMER (arXiv 2603.18492): experts whose weights are spread evenly go first; no data."""

from __future__ import annotations

import torch
from torch import nn

from prunekit.errors import ConfigError
from prunekit.registry import criteria
from prunekit.types import Group, Run, Scores, tensor_of


@criteria.register(paper="arXiv 2603.18492", year=2026, needs="-", kinds=("experts",))
@torch.no_grad()
def aimer(model: nn.Module, groups: list[Group], run: Run) -> Scores:
    """Minus the mean size of an expert's weights over their root mean square, which lies in (0, 1]
    and is 1 where all are of one size.

    Read off the matrices of the experts alone, fused or listed, not off the router. Raises
    ConfigError for units that are no experts.
    """
    scores = {}
    for g in groups:
        if g.kind != "experts":
            raise ConfigError(f"criterion=aimer scores experts, and {g.name} is of kind {g.kind}")
        total, squares, count = (torch.zeros(g.units, dtype=torch.float64) for _ in range(3))
        for m in g.members:
            weight = tensor_of(model, m.param).detach()
            if weight.dim() < 3 and m.width == 1:
                continue  # the router's row, and biases
            for u in range(g.units):
                w = weight.index_select(m.axis, m.index[u].to(weight.device)).float()
                total[u] += w.abs().sum().double().cpu()
                squares[u] += w.square().sum().double().cpu()
                count[u] += w.numel()
        for u, path in enumerate(g.modules):
            for p in model.get_submodule(path).parameters():
                if p.dim() > 1:
                    total[u] += p.float().abs().sum().double().cpu()
                    squares[u] += p.float().square().sum().double().cpu()
                    count[u] += p.numel()
        rms = (squares / count).sqrt()
        tiny = torch.finfo(torch.float64).tiny
        scores[g.name] = -(total / count / rms.clamp(min=tiny)).float()
    return scores
