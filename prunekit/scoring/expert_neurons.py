"""How much each neuron of each expert matters: a score for every pair, where discovery has one
index for all experts that lie in one tensor.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from prunekit.graph.expert_neurons import expert_slice, places
from prunekit.scoring.aggregate import channel_sum, scored, unit_scores
from prunekit.scoring.expert_inputs import FusedExperts, expert_inputs
from prunekit.scoring.gradients import backward
from prunekit.scoring.listed_experts import LoneNeurons, linear_squares, lone_reader
from prunekit.types import Group, Member, Run, tensor_of

log = logging.getLogger("prunekit")
NeuronScore = Literal["wanda_sp", "taylor", "magnitude"]


def neuron_scores(
    model: nn.Module,
    fused: Sequence[FusedExperts],
    lone: Sequence[LoneNeurons],
    run: Run,
    score: NeuronScore,
    weighted: bool,
) -> dict[str, Tensor]:
    """By the neurons' group (E, F) float32, higher stays: of `fused` experts, and of neurons that
    belong to one expert alone (E = 1).

    `wanda_sp`: the sum over outputs of |w| of `down_proj`, times the norm of what it reads over the
    tokens routed to the expert, each times the router's weight where `weighted`. `taylor`: sum over
    the neuron's weights of |w g|. `magnitude`: sum of their squares.
    """
    own = [one.neurons for one in lone]
    match score:
        case "wanda_sp":
            found = _wanda(model, fused, run, weighted) | _wanda_of_one(model, lone, run, weighted)
        case "taylor":
            found = _taylor(model, fused, own, run)
        case "magnitude":
            names = _scored_tensors(fused, own)
            squares = {n: tensor_of(model, n).detach().float().square() for n in names}
            found = _summed(fused, own, squares)
    return _idle_by_weights(model, fused, found)


def _scored_tensors(fused: Sequence[FusedExperts], lone: Sequence[Group]) -> list[str]:
    groups = [*(f.neurons for f in fused), *lone]
    return list(dict.fromkeys(m.param for g in groups for m in scored(g)))


def _wanda(
    model: nn.Module, fused: Sequence[FusedExperts], run: Run, weighted: bool
) -> dict[str, Tensor]:
    seen = expert_inputs(model, fused, run, weighted)
    found = {}
    for f in fused:
        slab, m = f.writer
        sizes = _over_experts(f.slabs, tensor_of(model, slab.param).detach().float().abs(), slab, m)
        found[f.neurons.name] = sizes * seen[f.group.name].inside.sqrt().to(sizes.device)
    return found


def _wanda_of_one(
    model: nn.Module, lone: Sequence[LoneNeurons], run: Run, weighted: bool
) -> dict[str, Tensor]:
    read = {one.neurons.name: (one, lone_reader(model, one)) for one in lone}
    names = {r.name: one.experts for one, r in read.values()}
    seen = linear_squares(model, names, run, weighted) if names else {}
    scores = {}
    for name, (_, r) in read.items():
        values = r.weight.detach().float().abs().sum(0) * seen[r.name].sqrt().to(r.weight.device)
        scores[name] = values[r.member.index.to(values.device)].sum(1)[None]
    return scores


def _taylor(
    model: nn.Module, fused: Sequence[FusedExperts], lone: Sequence[Group], run: Run
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def fold(name: str, weight: Tensor, gradient: Tensor, mean_squared: Tensor | None) -> None:
        size = (weight.float() * gradient.float()).abs()
        for f in fused:
            for slab, m in f.pairs:
                if slab.param == name:
                    part = _over_experts(f.slabs, size, slab, m)
                    found[f.neurons.name] = found.get(f.neurons.name, 0) + part
        for g in lone:
            for m in scored(g):
                if m.param == name:
                    part = channel_sum(size, m.axis)[m.index.to(size.device)].sum(1)[None]
                    found[g.name] = found.get(g.name, 0) + part

    backward(model, _scored_tensors(fused, lone), run, fold, squares=False)
    return found


def _summed(
    fused: Sequence[FusedExperts], lone: Sequence[Group], values: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Of a value a weight the sums over the weights of each neuron."""
    found = {}
    for f in fused:
        parts = [
            _over_experts(f.slabs, values[s.param], s, m) for s, m in f.pairs if s.param in values
        ]
        found[f.neurons.name] = torch.stack(parts).sum(0)
    for g in lone:
        channels = {(m.param, m.axis): channel_sum(values[m.param], m.axis) for m in scored(g)}
        found[g.name] = unit_scores(g, channels, "sum")[None]
    return found


def _over_experts(slabs: Sequence[Member], values: Tensor, slab: Member, neurons: Member) -> Tensor:
    """(E, F) sums of `values`, in the shape of a tensor, over what is one neuron's of an expert."""
    rows = []
    for e in range(len(slab.index)):
        part = values.index_select(slab.axis, slab.index[e].to(values.device))
        channels = channel_sum(part, neurons.axis)
        rows.append(channels[places(slab, neurons, e).to(values.device)].sum(1))
    return torch.stack(rows)


def _idle_by_weights(
    model: nn.Module, fused: Sequence[FusedExperts], found: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Experts that no token reached are ordered by their weights, below all others."""
    for f in fused:
        scores = found[f.neurons.name]
        idle = (scores == 0).all(1).nonzero()[:, 0].tolist()
        if idle:
            log.warning(
                "%s: no token reached %d experts; their neurons are ordered by their weights",
                f.group.name,
                len(idle),
            )
        for e in idle:
            for slab, m in f.pairs:
                part = expert_slice(model, slab, e).float().square()
                channels = channel_sum(part, m.axis)
                scores[e] += channels[places(slab, m, e).to(part.device)].sum(1).to(scores)
            scores[e] *= torch.finfo(torch.float32).tiny / scores[e].max().clamp(min=1e-30)
    return found
