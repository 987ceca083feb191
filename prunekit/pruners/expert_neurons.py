"""Neurons inside the experts of a mixture: each expert loses its own least important ones, and all
keep the same number, so that a layer stays one tensor and loads without code of ours.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from prunekit import graph
from prunekit.activations.blockwise import groups_by_block
from prunekit.activations.storage import PassOptions, Precision, Store
from prunekit.errors import ConfigError
from prunekit.graph.expert_neurons import reorder_neurons
from prunekit.problem import Expected, Problem, expect
from prunekit.pruners.expert_refit import Refit, prune_by_block
from prunekit.registry import Positive, pruners
from prunekit.scoring.expert_inputs import FusedExperts, fused_experts
from prunekit.scoring.expert_neurons import NeuronScore, neuron_scores
from prunekit.scoring.listed_experts import LoneNeurons, lone_neurons, lone_reader
from prunekit.selection.units import check_finite, keep_local
from prunekit.types import Group, Pruned, Scores


def neuron_groups(
    problem: Problem, shared: bool
) -> tuple[list[Group], list[FusedExperts], list[LoneNeurons]]:
    """The groups of neurons inside experts that are not excluded: all, those of experts that lie in
    one tensor, and those that belong to one expert of a list, or to a shared one where `shared`.
    Raises ConfigError where there are none.
    """
    everything = problem.everything()
    groups = problem.groups(["neurons"])
    names = {g.name for g in groups}
    fused = [f for f in fused_experts(problem.model, everything) if f.neurons.name in names]
    lone = [one for one in lone_neurons(everything, shared) if one.neurons.name in names]
    inside = [*(f.neurons.name for f in fused), *(one.neurons.name for one in lone)]
    if not fused and not any(one.experts for one in lone):
        raise ConfigError(
            f"{type(problem.model).__name__} has no experts whose neurons are known, or all are "
            "excluded: take pruner=oneshot for neurons outside of experts"
        )
    return [g for g in groups if g.name in inside], fused, lone


def check_expert_neurons(
    problem: Problem, *, score: str, refit: bool, shared: bool, **_: Any
) -> Expected:
    """Raises ConfigError where there are no experts, the ratio cannot be met, or experts would
    exchange neurons.
    """
    groups, _fused, lone = neuron_groups(problem, shared)
    if score in ("obs", "wanda_sp") or refit:
        for one in lone:
            lone_reader(problem.model, one)
    if score == "obs" or refit:
        groups_by_block(groups, problem.blocks())
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
    problem: Problem,
    *,
    score: NeuronScore | Literal["obs"] = "wanda_sp",
    weighted: bool = True,
    refit: bool = False,
    min_tokens: Positive = 32,
    shared: bool = False,
    store: Store = "memory",
    precision: Precision = "model",
) -> Pruned:
    """Removes from each expert the neurons that matter least to that expert; every expert of a
    layer keeps the same number.

    Args:
        score: `wanda_sp` the weights that read a neuron times the norm of its output on the tokens
            routed to the expert, `taylor` the change of the loss to first order, `magnitude` the
            weights alone, `obs` structured OBS: one neuron at a time, the one that the others can
            best make up for.
        weighted: with wanda_sp, obs and refit, tokens count by the router's weight.
        refit: what reads the neurons (`down_proj`) becomes the least squares map from those that
            stay, in closed form, each expert on its own tokens and block by block; a ridge is
            chosen for each expert on the half of its tokens that it is not fitted to.
        min_tokens: with obs and refit, an expert that got fewer keeps its weights, and loses
            neurons by wanda_sp.
        shared: neurons of shared experts go as well, as units of their own.
        store: with obs and refit, where activations between blocks wait.
        precision: likewise, of the forwards.

    An expert's neurons are put in the order of their scores, which changes nothing of what it
    computes; then the last ones of all experts are cut off together. Neurons of dense blocks stay.
    Experts that no token reached are ordered by their weights. Notes have the ridges, and the
    tokens of the experts that got too few. Raises ConfigError where there are no experts, and for
    ratios that let layers exchange neurons.
    """
    model = problem.model
    groups, fused, lone = neuron_groups(problem, shared)
    counts = problem.allocate(groups).counts
    changed = {name for name, n in counts.items() if n}
    fused = [f for f in fused if f.neurons.name in changed]
    lone = [one for one in lone if one.neurons.name in changed]
    if not changed:
        return Pruned(model, {}, groups, notes={"counts": counts})
    how = Refit(weighted, refit, min_tokens)
    scores: Scores = {}
    if score != "obs":
        scores = neuron_scores(model, fused, lone, problem.run(), score, weighted)
        check_finite(scores)
    if score == "obs" or refit:
        options = PassOptions(store, precision)
        scores = prune_by_block(problem, fused, lone, scores, counts, how, options)
    ranked = {f.neurons.name: put_in_order(problem, f, scores[f.neurons.name]) for f in fused}
    ranked |= {one.neurons.name: scores[one.neurons.name][0] for one in lone}
    kept = keep_local(ranked, counts)
    for f in fused:  # by place: its neurons are in order, for each expert another one
        neurons = f.neurons
        kept[neurons.name] = torch.arange(neurons.units) < neurons.units - counts[neurons.name]
    graph.remove(model, kept)
    return Pruned(model, kept, groups, ranked, {"counts": counts, **how.notes()})


@torch.no_grad()
def put_in_order(problem: Problem, fused: FusedExperts, scores: Tensor) -> Tensor:
    """Reorders each expert's neurons by `scores (E, F)`, the highest first. Returns (F,) what the
    neurons in each place come to.
    """
    orders = scores.argsort(dim=1, descending=True, stable=True)
    for e, order in enumerate(orders):
        reorder_neurons(problem.model, fused.slabs, fused.neurons, e, order)
    return scores.gather(1, orders).sum(0)
