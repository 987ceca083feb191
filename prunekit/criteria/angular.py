"""One contiguous run of blocks (The Unreasonable Ineffectiveness of the Deeper Layers, Gromov et
al., arXiv 2403.17887, section 3).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from prunekit.activations import processes
from prunekit.activations.hooks import hook_activations, pass_tokens
from prunekit.architecture.blocks import block_names, check_unbroken
from prunekit.registry import criteria
from prunekit.types import Group, Run, Scores


@criteria.register(
    paper="arXiv 2403.17887", year=2024, needs="data", kinds=("blocks",), uses_counts=True
)
@torch.no_grad()
def angular(
    model: nn.Module,
    groups: list[Group],
    run: Run,
    *,
    choice: Literal["angular", "last"] = "angular",
    tokens: Literal["last", "all"] = "last",
) -> Scores:
    """Angle between the inputs of block l and of block l + n, in half turns; the n lowest scores
    are the run of the least angle.

    A block scores the least angle among the runs through it, and one more if it is outside of the
    best run: so exactly that run goes. `choice=last` is the paper's simple variant: the n blocks
    before the model's last one. `tokens` averages over the last token of each sample (the paper) or
    over all. Raises ConfigError for a group that is no unbroken run of blocks.
    """
    scores = {}
    for g in groups:
        check_unbroken(g.modules, "criterion=angular removes")
        n = max(1, run.counts.get(g.name, 1))
        if choice == "angular":
            d = run_angles(model, g, run, n, tokens)
        else:
            # The model's last block stays; an exclusion may have left it out already.
            spared = int(g.modules[-1] == block_names(model)[-1])
            start = max(0, g.units - n - spared)
            d = (torch.arange(g.units - n + 1) - start).abs() / g.units
        best = int(d.argmin())
        inside = torch.stack([d[max(0, i - n + 1) : i + 1].min() for i in range(g.units)])
        outside = torch.ones(g.units)
        outside[best : best + n] = 0
        scores[g.name] = inside.float() + outside
    return scores


def run_angles(
    model: nn.Module, group: Group, run: Run, n: int, tokens: Literal["last", "all"]
) -> Tensor:
    """(U + 1 - n,) mean over tokens of arccos(cos(x_l, x_{l+n})) / pi: x_l enters block l of the
    group's U, and x_U leaves the last one.
    """
    seen: list[Tensor] = []
    sums = torch.zeros(group.units + 1 - n, dtype=torch.float64)

    def see(x: Tensor) -> None:
        seen.append((x[:, -1] if tokens == "last" else x.flatten(0, 1)).float())

    def leave(x: Tensor) -> None:
        see(x)
        rows = torch.stack([part.to(seen[0].device) for part in seen])
        seen.clear()
        cosine = torch.cosine_similarity(rows[: len(rows) - n], rows[n:], dim=-1).clamp(-1, 1)
        sums.add_(torch.arccos(cosine).double().sum(1).cpu())

    with hook_activations(model, dict.fromkeys(group.modules, see), {group.modules[-1]: leave}):
        pass_tokens(processes.own_part(run), "angles between blocks")
    processes.add_up([sums])
    return sums / (len(run.tokens) if tokens == "last" else run.tokens.numel()) / math.pi
