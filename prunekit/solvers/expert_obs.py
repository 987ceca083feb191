"""Structured OBS inside one expert: which of its neurons its `down_proj` can spare, and what that
becomes without them, from the tokens that were routed to it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prunekit.activations.gram import GramStatistics, added
from prunekit.solvers.least_squares import prior_ridge, ridge_problem
from prunekit.solvers.obs import greedy_removal
from prunekit.solvers.validated_ridge import Ridges, refitted


@torch.no_grad()
def obs_scores(weight: Tensor, folds: Sequence[GramStatistics], count: int) -> Tensor:
    """(F,) float32, higher stays: the turns at which `count` of the inputs of `weight (outputs, F)`
    go, the cheapest by `|W_j|^2 / [H^-1]_jj` first while the others make up for it; those that stay
    by what they would cost next to nothing else gone.
    """
    stats = added(folds)
    task = ridge_problem(stats, weight, prior_ridge(weight.shape[1]), affine=False)
    inverse = task.inverse()
    order, _ = greedy_removal(task.best, inverse, torch.arange(weight.shape[1])[:, None], count)
    cost = task.best.square().sum(0) / inverse.diagonal()
    rank = cost.argsort().argsort().float() + weight.shape[1]
    rank[order] = torch.arange(count, dtype=rank.dtype, device=rank.device)
    return rank


def diagonal_scores(weight: Tensor, stats: GramStatistics) -> Tensor:
    """(F,) sum of |w| of each input times the norm of what it reads; of no tokens the weights
    alone.
    """
    norm = stats.gram.diagonal().sqrt() if stats.tokens else torch.ones(len(stats.gram))
    return weight.float().abs().sum(0) * norm.to(weight.device)


@torch.no_grad()
def refitted_reader(
    weight: Tensor, folds: Sequence[GramStatistics], kept: Tensor
) -> tuple[Tensor, float]:
    """`weight (outputs, F)` refitted to the inputs `kept (F,)`, a mask, zeros elsewhere, and the
    ridge in tokens: the one that does best on each fold when fitted to the other.
    """
    columns = kept.nonzero()[:, 0].to(weight.device)
    start = Ridges(prior_ridge(weight.shape[1]), 0.0)
    A, _, ridges = refitted(folds, weight, columns, False, start, ["ridge"])
    new = torch.zeros_like(weight)
    new[:, columns] = A.to(weight)
    return new, ridges.ridge
