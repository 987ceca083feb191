"""Zero single weights, or N of every M inputs: magnitude and Wanda with their papers' schedules
(arXiv 2306.11695), OWL's shares through the ratio.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from prunekit.activations.blockwise import BlockRun
from prunekit.activations.runs import ModelRun
from prunekit.activations.storage import PassOptions, Precision, Store
from prunekit.architecture.mapped import beside
from prunekit.architecture.matrices import elements_gone, matrix, to_out_in, zero_elements
from prunekit.errors import ConfigError
from prunekit.problem import Expected, Problem, check_no_loss, expect, ranking_of
from prunekit.registry import Component, pruners
from prunekit.selection.channel_order import ChannelOrder
from prunekit.selection.elements import (
    NM,
    Pattern,
    Scope,
    check_pattern,
    each_row,
    element_mask,
    everywhere,
    or_sizes,
)
from prunekit.selection.units import check_finite
from prunekit.types import Allocation, Counts, Group, Kept, Pruned, Run, Scores

log = logging.getLogger("prunekit")
Schedule = Literal["blocks", "whole"]


def check_unstructured(
    problem: Problem,
    *,
    pattern: Pattern | None,
    permute: bool,
    schedule: Schedule,
    targets: list[str] | None,
    **_: Any,
) -> Expected:
    """Raises ConfigError where the ratio cannot be met, a pattern fits no matrix or ratio, or the
    criterion needs the loss of a block.
    """
    if schedule == "blocks":
        check_no_loss(problem, "pruner.schedule=blocks")
    groups, axes = _scorable(problem, targets)
    _permutable(permute, pattern, axes)
    expected = expect(problem, groups, smaller=False)
    check_pattern(problem.model, expected.groups, expected.counts, pattern, axes)
    _rankable(ranking_of(problem, expected), pattern, schedule, axes)
    return expected


def _scorable(problem: Problem, targets: list[str] | None) -> tuple[list[Group], dict[str, int]]:
    """The matrices that the criterion scores, and along which axis of (outputs, inputs) their
    elements compete where it is not along the inputs: a criterion that is particular about either
    says so in its registration.
    """
    groups, criterion = problem.matrices(targets), problem.criterion
    if not isinstance(criterion, Component) or "axes" not in criterion.meta:
        return groups, {}
    axes: dict[str, int] = criterion.meta["axes"](problem.model, groups)
    unscored = [g.name for g in groups if g.name not in axes]
    if len(unscored) == len(groups):
        raise ConfigError(
            f"criterion={criterion.name} scores none of the {len(groups)} matrices "
            f"({groups[0].name} .. {groups[-1].name})"
        )
    if unscored:
        log.info("%d matrices, which the criterion does not score, stay dense", len(unscored))
    return [g for g in groups if g.name in axes], axes


def _permutable(permute: bool, pattern: Pattern | None, axes: dict[str, int]) -> None:
    if permute and pattern is None:
        raise ConfigError("pruner.permute=true orders channels for N:M: give pruner.pattern")
    if permute and not all(axes.values()):
        raise ConfigError(
            "pruner.permute=true orders inputs, and the criterion compares along outputs"
        )


def _rankable(
    ranking: str, pattern: Pattern | None, schedule: Schedule, axes: dict[str, int]
) -> None:
    if ranking == "rows":
        if pattern or not all(axes.values()):
            raise ConfigError(
                "the ratio gives every row a number of its own, which a pattern and a criterion "
                "that compares along columns contradict: give ratio.per=matrix"
            )
        return
    if ranking != "local" and pattern:
        raise ConfigError(
            f"ratio.ranking={ranking} lets matrices exchange elements, which a "
            "pattern forbids: give ratio.ranking=local, or pruner.pattern=null"
        )
    if ranking != "local" and schedule == "blocks":
        raise ConfigError(
            f"ratio.ranking={ranking} ranks all matrices at once: it needs pruner.schedule=whole"
        )


@pruners.register(
    paper="arXiv 2306.11695",
    year=2023,
    out="zeros",
    scored=True,
    kinds=("weights",),
    check=check_unstructured,
)
@torch.no_grad()
def unstructured(
    problem: Problem,
    *,
    scope: Scope = "row",
    pattern: NM = None,
    permute: bool = False,
    schedule: Schedule = "blocks",
    targets: list[str] | None = None,
    store: Store = "memory",
    precision: Precision = "model",
) -> Pruned:
    """Zeroes the lowest elements of the linear matrices inside the blocks; shapes stay.

    Args:
        scope: `row` takes the same number from every output (rounded down), `matrix` so many of
            each matrix, `alpha` from every row the lowest ones up to the same share of its sum.
            With criterion=dass the rows of what makes intermediate channels are the inputs.
        pattern: "2:4" keeps 2 of every 4 consecutive inputs; the ratio must agree. "N:8" lets the
            ratio decide for each matrix (OWL's mixed N:8). The scope has no say then.
        permute: put the inputs of each matrix into the order in which the pattern keeps the most
            score (RIA's channel permutation): for nothing where discovery finds what makes them
            free to follow (down_proj; o_proj inside each head), else behind a gather that is saved
            with the model.
        schedule: `blocks` scores a block on what the pruned ones before it put out, `whole` all of
            them on the dense model: the same for magnitude, and faster.
        targets: names or globs of the linear modules in a block; null takes all.
        store: where activations between blocks wait.
        precision: of the forwards.

    Where every score of a matrix is 0 (an expert that no token reached) its smallest weights go.
    Raises ConfigError where a pattern fits no matrix or ratio.
    """
    model = problem.model
    groups, axes = _scorable(problem, targets)
    allocation = problem.allocate(groups)
    counts = allocation.counts
    check_pattern(model, groups, counts, pattern, axes)
    _rankable(allocation.ranking, pattern, schedule, axes)
    _permutable(permute, pattern, axes)
    order = ChannelOrder(model, pattern.m) if permute and pattern else None
    kept: Kept = dict(allocation.kept) if schedule == "blocks" else {}
    pruned: dict[str, Group] = {g.name: g for g in groups}
    options = PassOptions(store, precision)
    choose = partial(_choose, model, allocation=allocation, scope=scope, pattern=pattern, axes=axes)

    def chosen(row: list[Group], run: Run) -> Kept:
        scores = _scored(problem, row, run)
        if allocation.ranking in ("local", "rows"):
            return choose(row, scores)
        return everywhere(scores, sum(counts.values()))

    if kept:
        zero_elements(model, groups, kept)
        counts = {}  # nothing is left to do
    for row, run in _passes(problem, groups, counts, schedule, options, resumable=order is None):
        if order and pattern:
            scores = _scored(problem, row, run)
            keep = {g.name: pattern.kept_of(counts[g.name], g.units, g.name) for g in row}
            row, scores = order.arrange(run, row, scores, keep)
            pruned |= {g.name: g for g in row}
            mask = choose(row, scores)
        else:
            mask = run.once(partial(chosen, row, run))
        zero_elements(model, row, mask)
        # In host memory: the masks of all matrices come to a byte a weight.
        kept |= {
            g.name: beside(mask[g.name].cpu(), matrix(model, g)) for g in row if g.name in mask
        }
    gone = elements_gone(kept)
    emptied = [name for name, mask in kept.items() if gone[name] == mask.numel()]
    if emptied:
        log.warning("%d matrices lost every weight: %s", len(emptied), ", ".join(emptied[:5]))
    notes: dict[str, Any] = {"counts": gone, **allocation.notes, **_direction(kept, axes, pattern)}
    if order:
        notes["channels"] = order.notes
    return Pruned(model, kept, list(pruned.values()), {}, notes)


def _direction(kept: Kept, axes: dict[str, int], pattern: Pattern | None) -> dict[str, Any]:
    """Notes of the matrices whose elements were compared along their outputs."""
    along_outputs = [name for name in kept if not axes.get(name, 1)]
    if not along_outputs:
        return {}
    remark = (
        f"{len(along_outputs)} matrices have the pattern along their outputs: no layout that "
        "sparse tensor cores take"
    )
    return {"compared_along_outputs": along_outputs} | ({"remark": remark} if pattern else {})


def _passes(
    problem: Problem,
    groups: list[Group],
    counts: Counts,
    schedule: Schedule,
    options: PassOptions,
    resumable: bool,
) -> Iterator[tuple[list[Group], BlockRun | ModelRun]]:
    """Groups that lose something, with the run that scores them: block after block, or all."""
    if schedule == "whole":
        part = [g for g in groups if counts[g.name]]
        if part:
            yield part, problem.run()
        return
    for row, block in problem.by_block(groups, counts, options, resumable):
        yield [g for g in row if counts[g.name]], block


def _scored(problem: Problem, groups: list[Group], run: Run) -> Scores:
    """Raises ConfigError for scores that are not finite."""
    scores = problem.score(groups, run)
    check_finite(scores)
    return scores


def _choose(
    model: nn.Module,
    groups: list[Group],
    scores: Scores,
    *,
    allocation: Allocation,
    scope: Scope,
    pattern: Pattern | None,
    axes: dict[str, int],
) -> Kept:
    """Masks, stored like the matrices, of what stays."""
    out: Kept = {}
    for g in groups:
        along_outputs = axes.get(g.name, 1) == 0
        s = or_sizes(to_out_in(model, g, scores[g.name]), matrix(model, g), g.name)
        s = s.T.contiguous() if along_outputs else s
        if allocation.ranking == "rows":
            mask = each_row(s, allocation.rows[g.name])
        else:
            mask = element_mask(s, allocation.counts[g.name], scope, pattern, g.name)
        mask = mask.T if along_outputs else mask
        out[g.name] = to_out_in(model, g, mask).contiguous()
    return out
