"""COPAL-like continual pruning (after Malla et al., ICML 2024, arXiv 2405.02347): one text after
the other, and no text is seen twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from prunekit.activations.gram import grams
from prunekit.activations.runs import ModelRun, samples_at_once
from prunekit.activations.storage import PassOptions, Precision, Store
from prunekit.architecture.matrices import elements_gone, matrix, to_out_in, zero_elements
from prunekit.errors import ConfigError
from prunekit.problem import CALIBRATION, Expected, Problem
from prunekit.pruners.matrixwise import check_matrices, local_counts
from prunekit.registry import Positive, pruners
from prunekit.scoring.copal import sensitivity
from prunekit.scoring.wanda import input_norms, wanda_score
from prunekit.selection.elements import NM, Pattern, element_mask
from prunekit.selection.units import check_finite
from prunekit.types import Counts, Group, Kept, Pruned, Run, Scores

Scorer = Callable[[list[Group], Run], Scores]
"""`(outputs, inputs)` scores of matrices on one text."""


def check_copal(
    problem: Problem, *, pattern: Pattern | None, targets: list[str] | None, **_: Any
) -> Expected:
    """Raises ConfigError where the ratio cannot be met, or a pattern fits no matrix or ratio."""
    return check_matrices(problem, pattern, targets, "copal")


@pruners.register(
    paper="arXiv 2405.02347",
    year=2024,
    needs="data",
    out="zeros",
    several_texts=True,
    check=check_copal,
)
@torch.no_grad()
def copal(
    problem: Problem,
    *,
    scope: Literal["row", "matrix"] = "row",
    pattern: NM = None,
    held_out: Positive = 8,
    baseline: bool = True,
    targets: list[str] | None = None,
    store: Store = "memory",
    precision: Precision = "model",
) -> Pruned:
    """Prunes for one text after the other by what all so far say of the dense weights, so that a
    weight that went can return.

    Args:
        scope: who competes, the weights of a `row` or of a `matrix`.
        pattern: "2:4" keeps 2 of every 4 consecutive inputs; the ratio must agree.
        held_out: the last so many samples of each text tell perplexities and calibrate nothing.
        baseline: also prune by Wanda what the text before left, where zeros stay zeros (weight
            stasis), and report it beside.
        targets: names or globs of the linear modules in a block; null takes all.
        store: where activations between blocks wait.
        precision: of the forwards.

    The texts are those of calib=sequence. Between texts the dense weights and one score of each are
    kept. The notes have the perplexity of every text after every step, their mean at the end, and
    the backward transfer: by how much texts rose since they were pruned for. Raises ConfigError
    where a pattern fits no matrix or ratio, a text has too few samples, or scores are not finite.
    """
    texts = {n: t for n, t in problem.token_sets.items() if n != CALIBRATION}
    for name, tokens in texts.items():
        if len(tokens) <= held_out:
            raise ConfigError(
                f"{name} has {len(tokens)} samples: pruner.held_out={held_out} leaves none"
            )
    groups = problem.matrices(targets)
    counts = local_counts(problem, groups, pattern, "copal")
    dense = {g.name: matrix(problem.model, g).cpu().clone() for g in groups}

    def choose(g: Group, scores: Tensor) -> Tensor:
        mask = element_mask(scores, counts[g.name], scope, pattern, g.name)
        return to_out_in(problem.model, g, mask).contiguous()

    turns = _Turns(problem, groups, counts, texts, held_out, choose, PassOptions(store, precision))
    notes: dict[str, Any] = {"texts": list(texts), "dense": turns.perplexities()}
    if baseline:
        notes["stasis"], _ = turns.prune(_wanda_of_what_is_left, None)
        turns.restore(dense)
    notes["copal"], kept = turns.prune(_Accumulated(), dense)
    gone = elements_gone(kept)
    return Pruned(problem.model, kept, groups, {}, {"counts": gone, "continual": notes})


def _wanda_of_what_is_left(groups: list[Group], run: Run) -> Scores:
    """Zeros score zero: no weight returns."""
    norms = input_norms(run.model, groups, run)
    return {g.name: wanda_score(matrix(run.model, g), norms[g.name]) for g in groups}


class _Accumulated:
    """The sum of what all texts so far say, in host memory: of all matrices it is as large as the
    model in float32.
    """

    def __init__(self) -> None:
        self.total: Scores = {}

    def __call__(self, groups: list[Group], run: Run) -> Scores:
        for alike, gram in grams(run.model, groups, run):
            for g in alike:
                score = sensitivity(matrix(run.model, g), gram).cpu()
                seen = self.total.get(g.name)
                self.total[g.name] = score if seen is None else seen + score
        return {g.name: self.total[g.name].to(matrix(run.model, g).device) for g in groups}


class _Turns(NamedTuple):
    """Texts in turn, and what is done for each.

    Attributes:
        held_out: the last so many samples of each text.
        choose: from a matrix and its scores the mask of what stays, stored like the matrix.
    """

    problem: Problem
    groups: list[Group]
    counts: Counts
    texts: dict[str, Tensor]
    held_out: int
    choose: Callable[[Group, Tensor], Tensor]
    options: PassOptions

    def prune(self, score: Scorer, dense: dict[str, Tensor] | None) -> tuple[dict[str, Any], Kept]:
        """What `report` says, and the last masks. Every text begins with the `dense` matrices, or
        where none are given with what the text before left.
        """
        steps, kept = [], Kept()
        for tokens in self.texts.values():
            if dense is not None:
                self.restore(dense)
            one = replace(self.problem, token_sets={CALIBRATION: tokens[: -self.held_out]})
            before, kept = kept, {}
            for row, run in one.by_block(self.groups, self.counts, self.options):
                scores = score(row, run)
                check_finite(scores)
                mask = {g.name: self.choose(g, scores[g.name]) for g in row}
                zero_elements(one.model, row, mask)
                kept |= {name: stays.cpu() for name, stays in mask.items()}
            steps.append(self.perplexities() | {"changed": _changed(before, kept)})
        return report(steps, list(self.texts)), kept

    def restore(self, weights: dict[str, Tensor]) -> None:
        """Matrices as they were."""
        for g in self.groups:
            matrix(self.problem.model, g).copy_(weights[g.name])

    def perplexities(self) -> dict[str, float]:
        """Of the held-out samples of each text."""
        found = {}
        for name, text in self.texts.items():
            tokens = text[-self.held_out :]
            batch = samples_at_once(tokens)
            losses = [float(o.loss) for o in ModelRun(self.problem.model, tokens).losses(batch)]
            sizes = [len(part) for part in tokens.split(batch)]
            total = sum(n * loss for n, loss in zip(sizes, losses, strict=True))
            found[name] = math.exp(total / len(tokens))
        return found


def _changed(before: Kept, after: Kept) -> float:
    """Share of the mask's elements that are not as they were after the text before."""
    if not before:
        return 0.0
    units = sum(mask.numel() for mask in after.values())
    return sum(int((after[n] != before[n]).sum()) for n in after) / units


def report(steps: list[dict[str, float]], texts: list[str]) -> dict[str, Any]:
    """Perplexities after each step, their mean after the last, and the backward transfer: the mean
    over all texts but the last of the last perplexity less the one right after its own step.
    """
    last = steps[-1]
    rises = [last[name] - steps[i][name] for i, name in enumerate(texts[:-1])]
    return {
        "steps": steps,
        "mean": sum(last[name] for name in texts) / len(texts),
        "backward_transfer": sum(rises) / len(rises),
    }
