"""Block by block through the experts whose neurons go: chosen by a score or by structured OBS, and
`down_proj` refitted, for `pruner=expert_neurons`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.activations.gram import added
from prunekit.activations.storage import PassOptions
from prunekit.graph.expert_neurons import expert_slice, places, put_slice
from prunekit.problem import Problem
from prunekit.scoring.expert_grams import Folds, expert_grams
from prunekit.scoring.expert_inputs import FusedExperts
from prunekit.scoring.listed_experts import LoneNeurons, lone_reader
from prunekit.selection.units import without
from prunekit.solvers.expert_obs import diagonal_scores, obs_scores, refitted_reader
from prunekit.types import Counts, Scores

log = logging.getLogger("prunekit")


@dataclass
class Refit:
    """How experts are refitted, and what came of it.

    Attributes:
        weighted: tokens count by the router's weight.
        refit: false only silences what goes.
        few: experts with fewer tokens keep their weights.
        ridges: by group of neurons the ridges in tokens, of each expert that was refitted.
        left: likewise the tokens of those that were not.
    """

    weighted: bool
    refit: bool
    few: int
    ridges: dict[str, dict[int, float]] = field(default_factory=dict)
    left: dict[str, dict[int, int]] = field(default_factory=dict)

    def notes(self) -> dict[str, Any]:
        """What is worth showing, where something was to be refitted."""
        return {"ridges": self.ridges, "few_tokens": self.left} if self.refit else {}


@torch.no_grad()
def prune_by_block(
    problem: Problem,
    fused: list[FusedExperts],
    lone: list[LoneNeurons],
    given: Mapping[str, Tensor],
    counts: Counts,
    how: Refit,
    options: PassOptions,
) -> Scores:
    """Writes the `down_proj` that each expert has when `counts` of its neurons are gone, zeros for
    those, each block on what the pruned ones before it put out. Which go is said by the scores
    `given`, by OBS where there are none.

    Returns by the neurons' group (E, F) scores of which the lowest went. Warns of experts that got
    too few tokens to be refitted.
    """
    model = problem.model
    scores: Scores = {}
    groups = [f.neurons for f in fused] + [one.neurons for one in lone]
    for row, run in problem.by_block(groups, counts, options):
        names = {g.name for g in row if counts[g.name]}
        here = [f for f in fused if f.neurons.name in names]
        alone = [one for one in lone if one.neurons.name in names]
        grams = expert_grams(model, here, alone, run, how.weighted)
        both: list[FusedExperts | LoneNeurons] = [*here, *alone]
        for of in both:
            name = of.neurons.name
            own = given.get(name, [None] * len(grams[name]))
            found = [
                _prune_one(model, of, e, folds, own[e], counts[name], how)
                for e, folds in enumerate(grams[name])
            ]
            scores[name] = torch.stack(found)
    if how.left:
        log.warning(
            "fewer than %d tokens reached %d experts (%s): their neurons are gone and their "
            "weights are as they were; take more text",
            how.few,
            sum(len(experts) for experts in how.left.values()),
            ", ".join(f"{name}: {len(experts)}" for name, experts in how.left.items()),
        )
    return scores


def _prune_one(
    model: nn.Module,
    of: FusedExperts | LoneNeurons,
    expert: int,
    folds: Folds,
    scores: Tensor | None,
    count: int,
    how: Refit,
) -> Tensor:
    """The scores (F,) by which one expert lost its neurons."""
    name, weight, stats = of.neurons.name, reading(model, of, expert), added(folds)
    few = stats.tokens < how.few or not all(fold.tokens for fold in folds)
    if scores is None:
        scores = diagonal_scores(weight, stats) if few else obs_scores(weight, folds, count)
    kept = without(scores, min(count, len(scores) - 1))
    new = weight * kept.to(weight)
    if how.refit and few:
        how.left.setdefault(name, {})[expert] = stats.tokens
    elif how.refit:
        new, ridge = refitted_reader(weight, folds, kept)
        how.ridges.setdefault(name, {})[expert] = ridge
    write_reading(model, of, expert, new)
    return scores.float().cpu()


def reading(model: nn.Module, of: FusedExperts | LoneNeurons, expert: int) -> Tensor:
    """(outputs, F) a copy of what reads the neurons of one expert, in the order of their group."""
    if isinstance(of, LoneNeurons):
        reader = lone_reader(model, of)
        return reader.weight.detach()[:, reader.member.index[:, 0].to(reader.weight.device)]
    slab, m = of.writer
    part = expert_slice(model, slab, expert)
    at = places(slab, m, expert)[:, 0].to(part.device)
    return part.movedim(m.axis, 0)[at].reshape(len(at), -1).T


def write_reading(
    model: nn.Module, of: FusedExperts | LoneNeurons, expert: int, value: Tensor
) -> None:
    """Write what `reading` reads."""
    if isinstance(of, LoneNeurons):
        reader = lone_reader(model, of)
        reader.weight[:, reader.member.index[:, 0].to(reader.weight.device)] = value
        return
    slab, m = of.writer
    part = expert_slice(model, slab, expert)
    at = places(slab, m, expert)[:, 0].to(part.device)
    moved = part.movedim(m.axis, 0)
    moved[at] = value.T.reshape(moved[at].shape)
    put_slice(model, slab, expert, part)
