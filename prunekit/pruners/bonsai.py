"""Bonsai (Dery et al., 2024, arXiv 2402.05406): heads and neurons by how the model does without
random sets of them. Forward passes only, so that a model is pruned wherever it runs.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from prunekit import graph
from prunekit.activations.moments import moments
from prunekit.activations.runs import mean_loss
from prunekit.architecture.linear import check_read, readers
from prunekit.architecture.sizes import Sizes
from prunekit.errors import ConfigError
from prunekit.problem import Expected, Problem, expect
from prunekit.registry import Positive, Seed, pruners
from prunekit.scoring.lean_backward import lean_loss
from prunekit.scoring.wanda import read_sizes
from prunekit.selection.units import choose
from prunekit.solvers.bonsai import FOLDS, Fit, draw_pair, regress
from prunekit.types import Allocation, Counts, Group, Kept, Pruned, Run, Scores

Kinds = Annotated[list[Literal["heads", "neurons"]], Field(min_length=1)]
Masks = Annotated[int, Field(ge=2 * FOLDS, multiple_of=2)]
SHARE_A_ROUND = 0.05
"""Of the prunable parameters."""
WORST = math.log(1e8)
"""Log perplexity that stands for any beyond it, and for one that is not a number."""


class Turn(NamedTuple):
    """What a round does in a group.

    Attributes:
        candidates: units that it may do without, those of the lowest prior first.
        off: how many of them a mask takes away, on average.
        even: every mask takes as many. Else their number varies, since what a group as a whole is
            worth shows only where others lose more than it.
    """

    candidates: Tensor
    off: float
    even: bool

    def counts(self, generator: torch.Generator) -> tuple[int, int]:
        """How many units the two masks of a pair take."""
        most = len(self.candidates)
        if self.even:
            return int(self.off), min(int(self.off), most - int(self.off))
        if self.off >= 1:
            first = int(torch.randint(most + 1, (), generator=generator))
            return first, most - first
        both = float(torch.rand((), generator=generator)) < self.off
        return int(both), int(both and most > 1)


class Perturbation(NamedTuple):
    """The options of a round (see `bonsai`)."""

    masks: int
    utility: Literal["log_perplexity", "perplexity"]
    batch: int | None
    generator: torch.Generator


@dataclass
class Gates:
    """One z for all groups, of which the model's gates have views; and the units left by now."""

    groups: list[Group]
    flat: Tensor
    kept: Kept

    @staticmethod
    def open(groups: list[Group], device: torch.device) -> Gates:
        """With every unit left."""
        kept = {g.name: torch.ones(g.units, dtype=torch.bool) for g in groups}
        return Gates(groups, torch.ones(sum(g.units for g in groups), device=device), kept)

    @property
    def z(self) -> dict[str, Tensor]:
        """What `graph.gated` takes."""
        parts = self.flat.split([g.units for g in self.groups])
        return {g.name: part for g, part in zip(self.groups, parts, strict=True)}

    def set(self, off: dict[str, Tensor]) -> None:
        """Let through all units that are left but those of `off`."""
        left = {name: kept.float() for name, kept in self.kept.items()}
        for name, index in off.items():
            left[name][index] = 0
        self.flat.copy_(torch.cat([left[g.name] for g in self.groups]))


def check_bonsai(
    problem: Problem, *, kinds: list[str], rounds: int | Literal["auto"], remove: bool, **_: Any
) -> Expected:
    """Raises ConfigError where the ratio cannot be met, where no linear module reads the units, and
    for more rounds than there are units to take.
    """
    expected = expect(problem, problem.groups(kinds), smaller=remove)
    check_read(problem.model, expected.groups, "bonsai")
    total = sum((expected.counts or {}).values())
    if total and rounds != "auto" and rounds > total:
        raise ConfigError(f"pruner.rounds={rounds}: {total} units go in all, so at most {total}")
    return expected


@pruners.register(
    paper="arXiv 2402.05406", year=2024, needs="data", out="self-contained", check=check_bonsai
)
def bonsai(
    problem: Problem,
    *,
    kinds: Kinds = ["heads", "neurons"],  # noqa: B006 (never mutated; the YAML states it)
    masks: Masks = 200,
    rounds: Positive | Literal["auto"] = "auto",
    utility: Literal["log_perplexity", "perplexity"] = "log_perplexity",
    batch: Positive | None = None,
    seed: Seed = 0,
    remove: bool = True,
) -> Pruned:
    """Removes heads and neurons by a regression of the text's perplexity on random masks of them,
    in several rounds; needs forward passes only.

    Args:
        kinds: of units that may go.
        masks: forwards of the whole text a round, in pairs of complementary masks.
        rounds: the share removed grows linearly over so many; `auto` takes five percent of the
            prunable parameters in each (the paper).
        utility: what is regressed; the paper takes the perplexity itself, of which outliers decide
            then.
        batch: samples a forward; null takes as many as make up 4,096 tokens.
        seed: of the masks.
        remove: false zeroes instead of removing.

    Only units of a low prior (Wanda's, at the module that reads them) are tried in a round: in each
    group twice as many as should go. Units of equal worth go in the order of their priors. Notes
    have the penalty and Kendall's tau of each round. Nothing changes where the ratio removes
    nothing. Raises ConfigError for units that no linear module reads.
    """
    model = problem.model
    groups = check_bonsai(problem, kinds=list(kinds), rounds=rounds, remove=remove).groups
    allocation = problem.allocate(groups)
    counts = allocation.counts
    if allocation.empty:
        return Pruned(model, {}, groups, {}, {"counts": counts})
    how = Perturbation(masks, utility, batch, torch.Generator().manual_seed(seed))
    sizes = Sizes(model, groups)
    total = rounds_of(sizes, counts) if rounds == "auto" else rounds
    gates = Gates.open(groups, next(model.parameters()).device)
    first: Scores = {}
    notes = []
    with graph.gated(model, groups, gates.z):
        for step in tqdm(range(1, total + 1), desc="rounds", unit="round", delay=2):
            by_now = {name: count * step // total for name, count in counts.items()}
            now = dataclasses.replace(allocation, counts=by_now)
            gates.set({})
            prior = priors(gates, problem.run())
            turns = planned(gates, prior, now, sizes)
            if not turns:
                continue
            scores, fit = scored_by_masks(problem.run(), gates, prior, turns, how)
            gates.kept = choose(model, groups, scores, now)
            first = first or scores
            notes.append({"strength": fit.strength, "tau": fit.tau})
    (graph.remove if remove else graph.zero)(model, gates.kept)
    return Pruned(model, gates.kept, groups, first, {"counts": counts, "rounds": notes})


def rounds_of(sizes: Sizes, counts: Counts) -> int:
    """As many as make each take at most `SHARE_A_ROUND`."""
    return math.ceil(sizes.removed(counts) / (SHARE_A_ROUND * sizes.prunable()))


def scored_by_masks(
    run: Run, gates: Gates, prior: Scores, turns: dict[str, Turn], how: Perturbation
) -> tuple[Scores, Fit]:
    """Scores of all units as `choose` takes them, and the regression behind them."""
    pairs = [pair for _ in range(how.masks // 2) for pair in drawn(prior, turns, how.generator)]
    losses = log_perplexities(run, gates, pairs, how.batch)
    there = torch.cat([without(pairs, name, turn) for name, turn in turns.items()], 1)
    fit = regress(there, -(losses.exp() if how.utility == "perplexity" else losses))
    return ordered(gates, prior, turns, fit.worth), fit


def priors(gates: Gates, run: Run) -> Scores:
    """(U,) Wanda's scores: the mean size of the weights that read a channel, times the channel's
    root mean square; the mean over a unit's channels, summed over readers.
    """
    found = {g.name: readers(run.model, g) for g in gates.groups}
    seen = moments(run.model, dict.fromkeys(r.name for row in found.values() for r in row), run)
    prior: Scores = {}
    for name, row in found.items():
        sizes = [read_sizes(r.weight, seen[r.name]).cpu()[r.member.index].mean(1) for r in row]
        prior[name] = torch.stack(sizes).sum(0)
    return prior


def planned(gates: Gates, prior: Scores, now: Allocation, sizes: Sizes) -> dict[str, Turn]:
    """The turn of each group of which something may go. Where groups are ranked by themselves a
    mask takes what the round should take of each; else the round's share of the parameters, of
    groups of few units only sometimes one.
    """
    gone = {name: int((~kept).sum()) for name, kept in gates.kept.items()}
    before = sizes.removed(gone)
    share = (sizes.removed(now.counts) - before) / (sizes.prunable() - before)
    even = now.ranking == "local"
    turns = {}
    for name, kept in gates.kept.items():
        units = int(kept.sum())
        off = now.counts[name] - gone[name] if even else share * units
        wanted = min(2 * math.ceil(off), units - 1)  # the best unit stays
        if wanted > 0:
            low = torch.where(kept, prior[name], torch.inf).argsort(stable=True)[:wanted]
            turns[name] = Turn(low, min(off, math.ceil(wanted / 2)), even)
    return turns


def drawn(
    prior: Scores, turns: dict[str, Turn], generator: torch.Generator
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Units of each group that two complementary masks take away."""
    first, second = {}, {}
    for name, turn in turns.items():
        counts = turn.counts(generator)
        first[name], second[name] = draw_pair(prior[name], turn.candidates, *counts, generator)
    return first, second


def without(masks: list[dict[str, Tensor]], name: str, turn: Turn) -> Tensor:
    """(M, candidates) 1 where a mask leaves a candidate of the group."""
    return torch.stack([1 - torch.isin(turn.candidates, off[name]).float() for off in masks])


@torch.inference_mode()
def log_perplexities(
    run: Run, gates: Gates, masks: list[dict[str, Tensor]], batch: int | None
) -> Tensor:
    """(M,) mean loss of a predicted token under each mask, at most `WORST`. Raises ConfigError
    where none is finite.
    """
    found = []
    with lean_loss(run.model):
        for off in tqdm(masks, desc="masks", unit="mask", leave=False):
            gates.set(off)
            found.append(mean_loss(run, batch))
    values = torch.stack(found).cpu()
    if not values.isfinite().any():
        raise ConfigError("no mask leaves a finite perplexity: try model.dtype=float32")
    return values.nan_to_num(nan=WORST).clamp(max=WORST)


def ordered(gates: Gates, prior: Scores, turns: dict[str, Turn], worth: Tensor) -> Scores:
    """Places in the order in which units go: first those that are gone, then those that were tried,
    by worth and prior, then all others by prior. Priors are compared as shares of their group's
    mean.
    """
    relative = {
        name: prior[name] / prior[name][kept].mean().clamp(min=torch.finfo(torch.float32).tiny)
        for name, kept in gates.kept.items()
    }
    scores = {n: torch.where(gates.kept[n], 1 + relative[n], -1.0) for n in relative}
    tied = torch.cat([relative[name][turn.candidates] for name, turn in turns.items()])
    place = torch.empty(len(worth))
    place[torch.from_numpy(np.lexsort((tied.numpy(), worth.numpy())))] = torch.linspace(
        0, 0.5, len(worth)
    )
    lengths = [len(turn.candidates) for turn in turns.values()]
    for (name, turn), part in zip(turns.items(), place.split(lengths), strict=True):
        scores[name][turn.candidates] = part
    return scores
