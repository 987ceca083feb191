"""Experts of one router merged into fewer: who goes with whom, whose neurons are whose, and the
weighted mean that takes the place of the one that stays.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from prunekit.errors import ConfigError
from prunekit.graph.expert_neurons import (
    expert_members,
    expert_slice,
    neuron_members,
    neuron_rows,
    places,
    put_slice,
    reordered,
)
from prunekit.types import Group, Member

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


def aligned(
    model: nn.Module, slabs: Sequence[Member], neurons: Group, cluster: list[int]
) -> dict[int, Tensor]:
    """By expert of a cluster the order (F,) in which its neurons are nearest to those of the first,
    as one assignment of all: by the distance of their weights' directions, along `PCA` main ones.
    """
    from scipy.optimize import linear_sum_assignment

    rows = [nn.functional.normalize(neuron_rows(model, slabs, neurons, e), dim=1) for e in cluster]
    together = torch.cat(rows)
    together = together - together.mean(0)
    _, size, basis = torch.linalg.svd(together, full_matrices=False)
    short = nn.functional.normalize((together @ basis[:PCA].T) * size[:PCA], dim=1)
    first, *others = short.split([len(r) for r in rows])
    orders = [torch.arange(len(first))]
    for other in others:
        cost = torch.cdist(first, other).cpu().numpy()
        orders.append(torch.from_numpy(linear_sum_assignment(cost)[1]))
    return dict(zip(cluster, orders, strict=True))


@torch.no_grad()
def merge_cluster(
    model: nn.Module,
    group: Group,
    cluster: list[int],
    weight: Tensor,
    neurons: Group | None = None,
) -> None:
    """Write the weighted mean of a cluster's experts over its first one; `neurons` are put in the
    first one's order before.
    """
    members = expert_members(model, group)
    orders: dict[int, Tensor] = {}
    inside: dict[str, Member] = {}
    if neurons is not None:
        orders = aligned(model, members, neurons, cluster)
        inside = {s.param: m for s, m in neuron_members(members, neurons)}
    share = weight[cluster].double()
    if not float(share.sum()) > 0:
        share = torch.ones_like(share)
    share = share / share.sum()
    for m in members:
        total: Tensor | None = None
        for e, s in zip(cluster, share.tolist(), strict=True):
            part = expert_slice(model, m, e).float()
            if m.param in inside:
                at = places(m, inside[m.param], e)
                part = reordered(part, inside[m.param].axis, at, orders[e])
            total = part * s if total is None else total + part * s
        assert total is not None
        put_slice(model, m, cluster[0], total)
