"""Scores of whole experts from one pass: REAP (arXiv 2510.13999), how often and with what weight an
expert is picked, and the norms of its output (MSAN, arXiv 2606.15716).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from prunekit.registry import criteria
from prunekit.scoring.experts import ExpertStatistics, expert_statistics
from prunekit.types import Group, Run, Scores

Score = Literal[
    "reap",
    "frequency",
    "weighted_frequency",
    "ean_sum",
    "ean_mean",
    "msan",
    "weighted_ean_sum",
    "max_activation",
]


@criteria.register(paper="arXiv 2510.13999", year=2025, needs="data", kinds=("experts",))
@torch.no_grad()
def experts(model: nn.Module, groups: list[Group], run: Run, *, score: Score = "reap") -> Scores:
    """What the experts of a router did on the calibration text: REAP's mean of the router's weight
    times the norm of the output, and others from the same pass.

    Over the tokens routed to an expert, N of them, with the weight g that the module really
    multiplies with and the output f before that: `frequency` N, `weighted_frequency` sum g,
    `ean_sum` sum |f|, `ean_mean` the same over N (MAN), `msan` sum |f|^2 / N, `weighted_ean_sum`
    sum g |f|, `reap` the same over N, `max_activation` the largest element of f. An expert that no
    token reached scores 0, and the log says so. With pruner=layerwise a block is scored on what
    the pruned ones before it put out; with pruner=oneshot on the dense model, as REAP's authors do.

    Where the weight is multiplied with what an expert reads (Llama 4), f holds it and g is 1.

    Raises ConfigError for units that are no experts, and where an architecture's code cannot be
    followed from the experts' weights to the output.
    """
    found = expert_statistics(model, groups, run)
    return {name: expert_scores(s, score).float() for name, s in found.items()}


def expert_scores(s: ExpertStatistics, score: Score) -> Tensor:
    """(U,) of one router's experts."""
    tokens = s.frequency.clamp(min=1)
    match score:
        case "frequency":
            return s.frequency
        case "weighted_frequency":
            return s.weight
        case "ean_sum":
            return s.norm
        case "ean_mean":
            return s.norm / tokens
        case "msan":
            return s.squared_norm / tokens
        case "weighted_ean_sum":
            return s.weighted_norm
        case "reap":
            return s.weighted_norm / tokens
        case "max_activation":
            return s.maximum
