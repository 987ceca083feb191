"""Score the dense model, choose, apply; `steps` > 1 repeats it on what is left (LLM-Pruner's
schedule).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from prunekit import graph
from prunekit.errors import ConfigError
from prunekit.problem import CALIBRATION, Expected, Problem, expect
from prunekit.registry import Natural, Positive, pruners
from prunekit.scoring.experts import expert_coverage
from prunekit.selection.units import (
    choose,
    expand_to_all_blocks,
    remaining_blocks,
    restrict,
    whole_sizes,
)
from prunekit.solvers.bias_compensation import add_biases, check_readable, lost_means
from prunekit.types import Allocation, Counts, Group, Kept, Pruned, Scores

Kind = Literal["neurons", "heads", "hidden", "experts", "inner", "blocks"]
Kinds = Annotated[list[Kind], Field(min_length=1)]


def check_oneshot(
    problem: Problem,
    *,
    kinds: list[str],
    compensate: str,
    remove: bool,
    steps: int | Literal["each"],
    **_: Any,
) -> Expected:
    """Raises ConfigError where the ratio cannot be met, where nothing reads what a bias would make
    up for, and for more steps than there are units to take.
    """
    groups = problem.groups(kinds)
    if compensate == "bias":
        check_readable(problem.model, groups)
    expected = expect(problem, groups, smaller=remove)
    most = max((expected.counts or {}).values(), default=0)
    if expected.counts and steps != "each" and steps > max(1, most):
        raise ConfigError(
            f"pruner.steps={steps}: {most} units at most go from a group, so {most} steps at most "
            "take one; steps=each is that"
        )
    return expected


@dataclass(frozen=True)
class Step:
    """How the units of one step are chosen and applied."""

    kinds: Sequence[str]
    grouping: Literal["coupled", "none"]
    compensate: Literal["none", "bias"]
    skip: int
    norm: Literal["plain", "rescale"]
    remove: bool


@dataclass
class State:
    """Where a run over several steps stands.

    Attributes:
        everything: all groups at the start.
        eligible: of them, those that may lose units.
        kept: what is left of them by now.
        scores: of the first step.
        seen: how many tokens the experts got in the first step.
        unit: what a unit of each group counts in a ranking of all.
    """

    everything: list[Group]
    eligible: list[Group]
    kept: Kept = field(default_factory=dict)
    scores: Scores = field(default_factory=dict)
    seen: dict[str, Any] = field(default_factory=dict)
    unit: dict[str, int] = field(default_factory=dict)


@pruners.register(
    paper="arXiv 2305.11627", year=2023, out="self-contained", scored=True, check=check_oneshot
)
def oneshot(
    problem: Problem,
    *,
    kinds: Kinds = ["heads", "neurons"],  # noqa: B006 (never mutated; the YAML states it)
    grouping: Literal["coupled", "none"] = "coupled",
    steps: Positive | Literal["each"] = 1,
    redraw: bool = False,
    compensate: Literal["none", "bias"] = "none",
    skip: Natural = 0,
    norm: Literal["plain", "rescale"] = "plain",
    remove: bool = True,
) -> Pruned:
    """Scores every unit of `kinds` on the model as it is, removes the lowest, in one step or in
    several.

    Args:
        kinds: heads + neurons is the paper's Block strategy, hidden its Channel strategy, blocks
            drops whole layers.
        grouping: `none` lets every matrix choose its own units (the paper's Table 6: no
            dependency).
        steps: score and prune in this many steps; `each` takes one unit of a group at a time.
        redraw: every step scores on samples of its own, the calibration's shared out among the
            steps, as LLM-Pruner draws anew for each; false: all on all of them.
        compensate: `bias` leaves the mean output of what goes as a bias (FLAP).
        skip: tokens at the start of each sample that this mean leaves out.
        norm: `rescale` corrects RMSNorm for removed residual channels.
        remove: false zeroes instead of removing.

    Notes say how many tokens reached the experts of each layer. Raises ConfigError when nothing is
    left to prune, and with `redraw` for fewer samples than steps.
    """
    everything = problem.units(kinds)
    state = State(everything, problem.groups(kinds))
    allocation = problem.allocate(state.eligible)
    counts = allocation.counts
    total = max(1, *counts.values()) if steps == "each" else steps
    if total > 1 and allocation.ranking != "local":
        state.unit = whole_sizes(problem.model, state.eligible, allocation)[0]
    how = Step(kinds, grouping, compensate, skip, norm, remove)
    for step in range(1, total + 1):
        by_now = {name: count * step // total for name, count in counts.items()}
        seen = share_of(problem, step, total) if redraw else problem
        prune_once(seen, state, dataclasses.replace(allocation, counts=by_now), how)
    groups = [g for g in everything if g.name in counts]
    if grouping == "none":
        groups = split(groups, counts)[0]
    notes = {"counts": counts} | ({"experts_seen": state.seen} if state.seen else {})
    return Pruned(problem.model, state.kept, groups, state.scores, notes)


def share_of(problem: Problem, step: int, steps: int) -> Problem:
    """`problem` with the calibration samples of one step, every `steps`-th. Raises ConfigError
    where there are fewer samples than steps.
    """
    tokens = problem.tokens
    if len(tokens) < steps:
        raise ConfigError(
            f"pruner.redraw=true: {steps} steps need calib.samples={steps} or more, there are "
            f"{len(tokens)}"
        )
    sets = {**problem.token_sets, CALIBRATION: tokens[step - 1 :: steps]}
    return dataclasses.replace(problem, token_sets=sets)


def prune_once(problem: Problem, state: State, allocation: Allocation, how: Step) -> None:
    """Score the model as it is, and take units until as many are gone as `allocation` says."""
    model = problem.model
    now, groups, left = state.everything, state.eligible, allocation.counts
    if state.kept and how.remove:
        now = problem.units(how.kinds)
        groups = still_there(problem, state, how.kinds)
        left = still_to_go(state, groups, allocation)
    if not groups:
        return
    if how.grouping == "none":
        groups, left = split(groups, left)
    run = problem.run(left)
    scores = problem.score(groups, run)
    order = zeros_first(scores, groups, state) if state.kept and not how.remove else scores
    chosen = choose(model, groups, order, dataclasses.replace(allocation, counts=left))
    mask = expand_to_all_blocks(chosen, groups, now)
    lost = lost_means(model, groups, mask, run, how.skip) if how.compensate == "bias" else {}
    if how.remove:
        graph.remove(model, mask, norm=how.norm)
        kept = state.kept
        state.kept |= {n: restrict(kept[n], m) if n in kept else m for n, m in mask.items()}
    else:
        graph.zero(model, mask)
        state.kept = mask
    add_biases(model, lost)
    state.scores = state.scores or scores
    state.seen = state.seen or expert_coverage(run)


def still_there(problem: Problem, state: State, kinds: Sequence[str]) -> list[Group]:
    """The groups that may lose more, as the model has them now.

    A group of which one unit is left is none any more, and discovery may find others under its name
    (the query heads of the one key head): only those count that have as many units as were left.
    """
    found = []
    before = {g.name: g.units for g in state.eligible}
    for g in problem.groups(kinds):
        if g.modules:
            found.append(remaining_blocks(g, state.everything, state.eligible, state.kept))
        elif g.name in before:
            kept = state.kept.get(g.name)
            if kept is None or g.units == int(kept.sum()):
                found.append(g)
    return found


def still_to_go(state: State, groups: list[Group], allocation: Allocation) -> Counts:
    """How many units of `groups` go in this step. Where groups are ranked together, what one that
    is no more lost beyond its share is taken from the rest, of its kind if kinds stay apart.
    """
    counts, unit = allocation.counts, state.unit
    before = {g.name: g.units for g in state.eligible}
    left = {g.name: counts[g.name] - (before[g.name] - g.units) for g in groups}
    for g in state.eligible if allocation.ranking != "local" else ():
        if g.name not in left and g.name in state.kept:
            others = [o for o in groups if allocation.ranking == "global" or o.kind == g.kind]
            if others:
                one = min(others, key=lambda o: unit[o.name]).name
                owed = counts[g.name] - (g.units - int(state.kept[g.name].sum()))
                left[one] += round(owed * unit[g.name] / unit[one])
    return left


def zeros_first(scores: Scores, groups: list[Group], state: State) -> Scores:
    """Scores by which the units that were zeroed before are the first to go: no score says of
    them what it says of others.
    """
    low = min(float(s.min()) for s in scores.values()) - 1
    full = {g.name: g for g in state.everything}
    out = dict(scores)
    for g in groups:
        kept = state.kept.get(g.name)
        if kept is not None:
            if g.modules:
                kept = kept[[full[g.name].modules.index(m) for m in g.modules]]
            out[g.name] = scores[g.name].masked_fill(~kept.to(scores[g.name].device), low)
    return out


def split(groups: list[Group], counts: Counts) -> tuple[list[Group], Counts]:
    """Every member a group of its own with its group's count: structures chosen without regard to
    what depends on them (Table 6).
    """
    parts = [part for g in groups for part in g.parts]
    return parts, {part.name: counts[part.whole] for part in parts}
