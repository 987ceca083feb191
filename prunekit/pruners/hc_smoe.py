"""HC-SMoE (Chen et al., ICML 2025, arXiv 2410.08589): experts that put out alike become one."""

from __future__ import annotations

from torch import Tensor

from prunekit.activations.storage import PassOptions, Precision, Store
from prunekit.problem import Problem
from prunekit.pruners.expert_blocks import check_merging, merge_by_block
from prunekit.registry import pruners
from prunekit.scoring.expert_outputs import expert_outputs
from prunekit.scoring.experts import expert_statistics
from prunekit.solvers.expert_merging import Clusters, by_average_linkage
from prunekit.types import Group, Pruned, Run


@pruners.register(
    paper="arXiv 2410.08589",
    year=2025,
    needs="data",
    out="self-contained",
    kinds=("experts",),
    check=check_merging,
)
def hc_smoe(problem: Problem, *, store: Store = "memory", precision: Precision = "model") -> Pruned:
    """Merges the experts of a layer whose mean outputs over all tokens are near each other, by
    agglomerative clustering with average linkage; a merged expert is the mean of its members,
    weighted by how often each is picked.

    Args:
        store: where the activations between two blocks wait.
        precision: of the forwards.

    The most frequent member's row of the router stays, so that the result loads as a smaller model
    of its class; the paper lets the rows of all members point to the merged expert. Blocks are
    merged one after the other, each on what the merged ones before it put out. Notes have the
    clusters. Raises ConfigError for experts of other shapes in one list, and for routers that pick
    groups first.
    """

    def plan(group: Group, run: Run, left: int) -> tuple[Clusters, Tensor]:
        frequency = expert_statistics(problem.model, [group], run)[group.name].frequency.cpu()
        vectors = expert_outputs(problem.model, group, run).mean
        return by_average_linkage(vectors, left, frequency), frequency

    return merge_by_block(problem, plan, PassOptions(store, precision), align=False)
