"""Experts of one router merged into fewer: who goes with whom, whose neurons are whose, and the
weighted mean that takes the place of the one that stays.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from prunekit.errors import ConfigError
from prunekit.graph.expert_bodies import ExpertBody

Clusters = list[list[int]]
"""Experts that become one; the first of each is the one whose row of the router stays."""
PCA = 64
"""Directions in which neurons' weights are compared (REAM)."""


def by_average_linkage(vectors: Tensor, clusters: int, frequency: Tensor) -> Clusters:
    """Agglomerative clusters of `vectors (E, C)` by their Euclidean distance, average linkage; the
    most frequent expert of each comes first.
    """
    from scipy.cluster.hierarchy import cut_tree, linkage

    if clusters == len(vectors):
        return [[e] for e in range(clusters)]
    label = cut_tree(linkage(vectors.numpy(), "average"), n_clusters=clusters)[:, 0].tolist()
    order = frequency.argsort(descending=True, stable=True).tolist()
    return [[e for e in order if label[e] == c] for c in range(clusters)]


def around_centroids(scores: Tensor, similarity: Tensor, clusters: int, size: int) -> Clusters:
    """REAM's grouping: the highest scores are centroids; from the highest down each takes up to
    `size - 1` of those that no one has, the most similar first.

    Raises ConfigError where some would be left over.
    """
    order = scores.argsort(descending=True, stable=True).tolist()
    found: Clusters = [[e] for e in order[:clusters]]
    free = set(order[clusters:])
    for cluster in found:
        near = similarity[cluster[0]].argsort(descending=True, stable=True).tolist()
        taken = [e for e in near if e in free][: size - 1]
        cluster += taken
        free -= set(taken)
    if free:
        raise ConfigError(
            f"pruner.size={size}: {clusters} groups of so many hold fewer than {len(order)} experts"
        )
    return found


def aligned(model: nn.Module, bodies: Sequence[ExpertBody]) -> list[Tensor]:
    """Of each expert of a cluster the order (F,) in which its neurons are nearest to those of the
    first, as one assignment of all: by the distance of their weights' directions, along `PCA` main
    ones.
    """
    from scipy.optimize import linear_sum_assignment

    rows = [nn.functional.normalize(body.rows(model), dim=1) for body in bodies]
    together = torch.cat(rows)
    together = together - together.mean(0)
    _, size, basis = torch.linalg.svd(together, full_matrices=False)
    short = nn.functional.normalize((together @ basis[:PCA].T) * size[:PCA], dim=1)
    first, *others = short.split([len(r) for r in rows])
    orders = [torch.arange(len(first))]
    for other in others:
        cost = torch.cdist(first, other).cpu().numpy()
        orders.append(torch.from_numpy(linear_sum_assignment(cost)[1]))
    return orders


@torch.no_grad()
def merge_cluster(
    model: nn.Module,
    bodies: Sequence[ExpertBody],
    cluster: list[int],
    weight: Tensor,
    align: bool = False,
) -> None:
    """Write the weighted mean of a cluster's experts over its first one; with `align` neurons are
    put in the first one's order before. `bodies` are of all experts, `weight (E,)` too.
    """
    mine = [bodies[e] for e in cluster]
    orders = aligned(model, mine) if align else [None] * len(mine)
    share = weight[cluster].double()
    if not float(share.sum()) > 0:
        share = torch.ones_like(share)
    share = share / share.sum()
    total: dict[str, Tensor] = {}
    for body, order, s in zip(mine, orders, share.tolist(), strict=True):
        for name, value in body.reordered(model, order).items():
            total[name] = total[name] + value * s if name in total else value * s
    for name, value in total.items():
        mine[0].write(model, name, value)
