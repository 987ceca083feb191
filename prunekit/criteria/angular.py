"""One contiguous run of blocks (The Unreasonable Ineffectiveness of the Deeper Layers, Gromov et
al., arXiv 2403.17887, section 3).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from prunekit.activations.hooks import hook_activations, pass_tokens
from prunekit.architecture.blocks import block_names
from prunekit.errors import ConfigError
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
        n = max(1, run.counts.get(g.name, 1))
        if choice == "angular":
            d = run_angles(states(model, g, run, tokens), n)
        else:
            # An exclusion may have left the last block out already.
            spared = int(g.modules[-1] == block_names(model)[-1])
            d = (torch.arange(g.units - n + 1) - max(0, g.units - n - spared)).abs() / g.units
        best = int(d.argmin())
        inside = torch.stack([d[max(0, i - n + 1) : i + 1].min() for i in range(g.units)])
        outside = torch.ones(g.units)
        outside[best : best + n] = 0
        scores[g.name] = inside.cpu() + outside
    return scores


def run_angles(x: Tensor, n: int) -> Tensor:
    """(L + 1 - n,) mean over samples of arccos(cos(x_l, x_{l+n})) / pi, from `x (L + 1, M, C)`."""
    cosine = torch.cosine_similarity(x[: len(x) - n], x[n:], dim=-1).clamp(-1, 1)
    return (torch.arccos(cosine) / math.pi).mean(1)


def states(model: nn.Module, group: Group, run: Run, tokens: str) -> Tensor:
    """(L + 1, M, C) float32: what enters each block, and what leaves the last."""
    places = [n.rpartition(".") for n in group.modules]
    first = int(places[0][2])
    if [(p, int(i)) for p, _, i in places] != [
        (places[0][0], first + i) for i in range(len(places))
    ]:
        raise ConfigError(
            "criterion=angular removes one unbroken run of blocks, and "
            f"{', '.join(group.modules)} is none"
        )
    seen: dict[str, list[Tensor]] = {n: [] for n in (*group.modules, "after")}

    def see(name: str, x: Tensor) -> None:
        seen[name].append((x[:, -1] if tokens == "last" else x.flatten(0, 1)).float())

    with hook_activations(
        model,
        {n: partial(see, n) for n in group.modules},
        {group.modules[-1]: partial(see, "after")},
    ):
        pass_tokens(run, "angles between blocks")
    rows = [torch.cat(parts) for parts in seen.values()]
    return torch.stack([x.to(rows[0].device) for x in rows])
