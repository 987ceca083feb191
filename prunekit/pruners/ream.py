"""REAM (arXiv 2604.04356): the experts that REAP would remove become part of those that stay."""

from __future__ import annotations

from torch import Tensor

from prunekit.activations.storage import PassOptions, Precision, Store
from prunekit.problem import Problem
from prunekit.pruners.expert_blocks import check_merging, merge_by_block
from prunekit.registry import Positive, pruners
from prunekit.scoring.expert_outputs import expert_outputs
from prunekit.scoring.experts import expert_statistics
from prunekit.solvers.expert_merging import Clusters, around_centroids
from prunekit.types import Group, Pruned, Run


@pruners.register(
    paper="arXiv 2604.04356",
    year=2026,
    needs="data",
    out="self-contained",
    kinds=("experts",),
    check=check_merging,
)
def ream(
    problem: Problem,
    *,
    size: Positive = 16,
    align: bool = True,
    store: Store = "memory",
    precision: Precision = "model",
) -> Pruned:
    """Merges the experts of lowest REAP score into those of highest, which take the most similar
    ones in turn; a merged expert is the mean of its members, weighted by their scores, after their
    neurons were put in the order of the first.

    Args:
        size: of a group at most (the paper's C): a small one spreads the merging over many experts,
            a large one leaves most as they are.
        align: match neurons by one assignment, on the distances of their weights.
        store: where the activations between two blocks wait.
        precision: of the forwards.

    Similarity is the mean of how alike outputs and the router's logits are, over all tokens. The
    authors' code compares the mean outputs, each times the router's softmax, and adds the neurons'
    activations to what they are matched by. An expert that no token reached has no weight, and its
    neurons go. Blocks are merged one after the other. Notes have the groups. Raises ConfigError for
    experts of other shapes in one list, for routers that pick groups first, and for groups that are
    too small to hold all experts.
    """

    def plan(group: Group, run: Run, left: int) -> tuple[Clusters, Tensor]:
        s = expert_statistics(problem.model, [group], run)[group.name]
        reap = (s.weighted_norm / s.frequency.clamp(min=1)).cpu()
        alike = expert_outputs(problem.model, group, run).similarity()
        return around_centroids(reap, alike, left, size), reap

    return merge_by_block(problem, plan, PassOptions(store, precision), align)
