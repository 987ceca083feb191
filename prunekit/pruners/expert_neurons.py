"""Neurons inside the experts of a mixture: each expert loses its own least important ones, and all
keep the same number, so that a layer stays one tensor and loads without code of ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prunekit import graph
from prunekit.errors import ConfigError
from prunekit.graph.expert_neurons import reorder_neurons
from prunekit.problem import Expected, Problem, expect
from prunekit.registry import pruners
from prunekit.scoring.expert_inputs import FusedExperts, fused_experts
from prunekit.scoring.expert_neurons import NeuronScore, neuron_scores
from prunekit.selection.units import check_finite, keep_local
from prunekit.types import Group, Pruned


def neuron_groups(problem: Problem) -> tuple[list[Group], list[FusedExperts], list[Group]]:
    """The groups of neurons inside experts that are not excluded: all, those of experts that lie in
    one tensor, and those that belong to one expert of a list. Raises ConfigError where there are
    none.
    """
    everything = problem.everything()
    listed = [f"{path}." for g in everything if g.kind == "experts" for path in g.modules]
    groups = problem.groups(["neurons"])
    names = {g.name for g in groups}
    fused = [f for f in fused_experts(problem.model, everything) if f.neurons.name in names]
    lone = [g for g in groups if any(g.members[0].param.startswith(path) for path in listed)]
    inside = [*(f.neurons.name for f in fused), *(g.name for g in lone)]
    if not inside:
        raise ConfigError(
            f"{type(problem.model).__name__} has no experts whose neurons are known, or all are "
            "excluded: take pruner=oneshot for neurons outside of experts"
        )
    return [g for g in groups if g.name in inside], fused, lone


def check_expert_neurons(problem: Problem, **_: Any) -> Expected:
    """Raises ConfigError where there are no experts, the ratio cannot be met, or experts would
    exchange neurons.
    """
    groups, _fused, _lone = neuron_groups(problem)
    expected = expect(problem, groups)
    if expected.counts is not None and problem.allocate(groups).ranking != "local":
        raise ConfigError(
            "all experts of a layer keep the same number of neurons, and the ratio lets groups "
            "exchange them: give ratio.ranking=local"
        )
    return expected


@pruners.register(
    paper="-",
    year=2026,
    needs="data",
    out="self-contained",
    kinds=("neurons",),
    check=check_expert_neurons,
)
def expert_neurons(
    problem: Problem, *, score: NeuronScore = "wanda_sp", weighted: bool = True
) -> Pruned:
    """Removes from each expert the neurons that matter least to that expert; every expert of a
    layer keeps the same number.

    Args:
        score: `wanda_sp` the weights that read a neuron times the norm of its output on the tokens
            routed to the expert, `taylor` the change of the loss to first order, `magnitude` the
            weights alone.
        weighted: with wanda_sp, outputs count times the router's weight (experts that lie in one
            tensor).

    An expert's neurons are put in the order of their scores, which changes nothing of what it
    computes; then the last ones of all experts are cut off together. Neurons of shared experts and
    of dense blocks stay. Experts that no token reached are ordered by their weights. Raises
    ConfigError where there are no experts, and for ratios that let layers exchange neurons.
    """
    model = problem.model
    groups, fused, lone = neuron_groups(problem)
    counts = check_expert_neurons(problem).counts or problem.allocate(groups).counts
    changed = {name for name, n in counts.items() if n}
    fused = [f for f in fused if f.neurons.name in changed]
    lone = [g for g in lone if g.name in changed]
    notes = {"counts": counts}
    if not changed:
        return Pruned(model, {}, groups, notes=notes)
    scores = neuron_scores(model, fused, lone, problem.run(), score, weighted)
    check_finite(scores)
    ranked = {f.neurons.name: put_in_order(problem, f, scores[f.neurons.name]) for f in fused}
    ranked |= {g.name: scores[g.name][0] for g in lone}
    kept = keep_local(ranked, counts)
    kept |= {f.neurons.name: first(f.neurons, counts) for f in fused}
    graph.remove(model, kept)
    return Pruned(model, kept, groups, ranked, notes)


def first(neurons: Group, counts: dict[str, int]) -> Tensor:
    """The mask of the places that stay."""
    return torch.arange(neurons.units) < neurons.units - counts[neurons.name]


@torch.no_grad()
def put_in_order(problem: Problem, fused: FusedExperts, scores: Tensor) -> Tensor:
    """Reorders each expert's neurons by `scores (E, F)`, the highest first. Returns (F,) what the
    neurons in each place come to.
    """
    orders = scores.argsort(dim=1, descending=True, stable=True)
    for e, order in enumerate(orders):
        reorder_neurons(problem.model, fused.slabs, fused.neurons, e, order)
    return scores.gather(1, orders).sum(0)
