"""LaCo (Yang et al., EMNLP 2024 Findings, arXiv 2402.11187): blocks merged into the one below them,
from the top of the model to the bottom, wherever the final hidden states hardly turn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from tqdm import tqdm

from prunekit import graph
from prunekit.activations.runs import forward
from prunekit.architecture.blocks import check_unbroken
from prunekit.errors import ConfigError
from prunekit.graph.merging import (
    Merge,
    Rule,
    Values,
    check_mergeable,
    merge_blocks,
    merged_values,
    with_merges,
)
from prunekit.problem import Expected, Problem
from prunekit.registry import Positive, pruners
from prunekit.selection.units import expand_to_all_blocks
from prunekit.types import Group, Pruned

Several = Annotated[int, Field(ge=2)]
Cosine = Annotated[float, Field(ge=-1, le=1)]
BISECTIONS = 12
"""They tell a threshold to 0.0005."""


@dataclass(frozen=True)
class Stack:
    """Which of the blocks are left, in order, and how they came to be."""

    blocks: tuple[str, ...]
    merges: tuple[Merge, ...] = ()

    @property
    def gone(self) -> tuple[str, ...]:
        """Blocks that became part of another."""
        return tuple(name for merge in self.merges for name in merge["blocks"])

    def merged(self, place: int, count: int, rule: Rule) -> Stack:
        """The block at `place` with the `count` that follow it merged into it, or as many as
        there are.
        """
        end = min(place + 1 + count, len(self.blocks))
        others = list(self.blocks[place + 1 : end])
        merge = Merge(into=self.blocks[place], blocks=others, rule=rule)
        left = self.blocks[: place + 1] + self.blocks[end:]
        return Stack(left, (*self.merges, merge))


class Walk(NamedTuple):
    """How the search goes down the blocks.

    Attributes:
        merge: blocks that become one.
        interval: blocks to go down after a merge; one after a refusal.
        rule: of the merge.
        most: blocks to lose at most; the last merge takes no more than are left to lose.
    """

    merge: int
    interval: int
    rule: Rule
    most: int

    def search(self, blocks: tuple[str, ...], accepts: Callable[[Stack], bool]) -> Stack:
        """What is left after all merges that `accepts` says yes to."""
        stack, place = Stack(blocks), len(blocks) - 1 - self.merge
        while place >= 0 and len(stack.gone) < self.most:
            count = min(self.merge - 1, self.most - len(stack.gone))
            trial = stack.merged(place, count, self.rule)
            accepted = accepts(trial)
            stack = trial if accepted else stack
            place -= self.interval if accepted else 1
        return stack


class Similarity:
    """How far the final hidden states of a text turn when blocks are merged: the mean over samples
    of their cosine with the dense model's, all tokens of a sample as one vector.

    The model holds its own weights before and after; nothing is copied but the blocks that changed.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, tokens: Tensor, batch: int) -> None:
        self.model, self.parts = model, tokens.split(batch)
        self.dense = [self._hidden(ids) for ids in self.parts]
        self.seen: dict[str, float] = {}
        self.standing: tuple[tuple[Merge, ...], Values] = ((), {})

    def _hidden(self, ids: Tensor) -> Tensor:
        """(n, T C) after the final norm."""
        x: Tensor = forward(self.model, ids, head=False)[0]
        return x.flatten(1)

    def values(self, merges: tuple[Merge, ...]) -> Values:
        """Parameters that the merges change. Those of all but the last are kept for the next
        trial.
        """
        if self.standing[0] != merges[:-1]:
            values: Values = {}
            for merge in merges[:-1]:
                values |= merged_values(self.model, merge, values)
            self.standing = (merges[:-1], values)
        before = self.standing[1]
        return before | merged_values(self.model, merges[-1], before)

    @torch.no_grad()
    def __call__(self, stack: Stack) -> float:
        key = repr(stack.merges)
        if key not in self.seen:
            with with_merges(self.model, self.values(stack.merges), stack.gone):
                found = [
                    torch.cosine_similarity(self._hidden(ids).double(), dense.double(), dim=-1)
                    for ids, dense in zip(self.parts, self.dense, strict=True)
                ]
            self.seen[key] = float(torch.cat(found).mean())
        return self.seen[key]


def check_laco(
    problem: Problem, *, threshold: float | None, merge: int, interval: int, **_: Any
) -> Expected:
    """Raises ConfigError where not exactly one of ratio and threshold decides, where blocks cannot
    be merged, and where the search cannot reach the ratio.
    """
    if (threshold is None) == (problem.ratio is None):
        given = "both" if problem.ratio else "neither"
        raise ConfigError(
            f"pruner=laco is told by a ratio or by pruner.threshold when to stop, and {given} was "
            "given: pruner.threshold=null, or ratio=none with a threshold"
        )
    [group] = problem.groups(["blocks"])
    check_mergeable(problem.model, group.modules)
    check_unbroken(group.modules, "pruner=laco merges within")
    if group.units <= merge:
        raise ConfigError(
            f"pruner.merge={merge}: {group.units} blocks may be merged, and the last of them is in "
            "no first merge: merge fewer at a time"
        )
    if threshold is not None:
        return Expected([group], None, remark="The cosines decide how many blocks go.")
    counts = problem.allocate([group]).counts
    reach = Walk(merge, interval, "differences", group.units).search(group.modules, lambda _: True)
    if counts[group.name] > len(reach.gone):
        raise ConfigError(
            f"{counts[group.name]} blocks should go, and {len(reach.gone)} can with "
            f"pruner.merge={merge} pruner.interval={interval}: a smaller interval reaches more"
        )
    return Expected([group], counts)


@pruners.register(
    paper="arXiv 2402.11187",
    year=2024,
    needs="data",
    out="self-contained",
    kinds=("blocks",),
    check=check_laco,
)
@torch.no_grad()
def laco(
    problem: Problem,
    *,
    threshold: Cosine | None = None,
    merge: Several = 2,
    interval: Positive = 1,
    rule: Rule = "differences",
    batch: Positive = 8,
) -> Pruned:
    """Merges runs of blocks into their first one, from the top down, where the final hidden states
    stay alike; so many as the ratio says, or a threshold.

    Args:
        threshold: of the mean cosine between final hidden states, above which a merge is made; null
            takes the highest one at which the ratio's number of blocks goes, by bisection.
        merge: blocks that become one (the paper's C, 3 to 7 there).
        interval: blocks to go down after a merge (the paper's I).
        rule: `differences` adds those of all merged blocks to the first one's matrices (the paper's
            formula); `last` takes the last one's matrices (what the published notebooks compute).
            Two blocks are the same by both. Of more, the first wants matrices that are alike:
            where they are not, their sizes add up and nothing is left of the model.
        batch: samples a forward.

    Norms are those of the first block. The notes have the merges, from which `replay` makes the
    same model. A few short samples are the paper's setting. Raises ConfigError where the ratio
    cannot be reached, and for blocks that are not built alike.
    """
    model = problem.model
    expected = check_laco(problem, threshold=threshold, merge=merge, interval=interval)
    [group] = expected.groups
    most = group.units if expected.counts is None else expected.counts[group.name]
    stack, limit = Stack(group.modules), threshold
    trials: dict[str, float] = {}
    if most:
        similar = Similarity(model, problem.tokens, batch)
        walk = Walk(merge, interval, rule, most)
        if threshold is None:
            stack, limit = bisected(group.modules, walk, similar)
        else:
            stack = walk.search(group.modules, lambda s: similar(s) > threshold)
        trials = similar.seen
    whole = problem.units(["blocks"])
    kept = expand_to_all_blocks({group.name: remaining(group, stack)}, [group], whole)
    merge_blocks(model, stack.merges)
    graph.remove(model, kept)
    cosine = trials.get(repr(stack.merges), 1.0)
    found = {"threshold": limit, "cosine": cosine, "trials": len(trials)}
    notes = {
        "counts": {group.name: len(stack.gone)},
        "laco": found,
        "merges": [dict(m) for m in stack.merges],
    }
    return Pruned(model, kept, whole, notes=notes)


def remaining(group: Group, stack: Stack) -> Tensor:
    """(U,) bool: blocks of the group that are left."""
    return torch.tensor([name in stack.blocks for name in group.modules])


def bisected(blocks: tuple[str, ...], walk: Walk, similar: Similarity) -> tuple[Stack, float]:
    """The stack that lost `walk.most` blocks at the highest threshold that allows it, and that
    threshold.
    """
    best, low, high = walk.search(blocks, lambda _: True), -1.0, 1.0
    for _ in tqdm(range(BISECTIONS), desc="thresholds", unit="search", delay=2):
        middle = (low + high) / 2
        stack = walk.search(blocks, lambda s, t=middle: similar(s) > t)  # type: ignore[misc]
        if len(stack.gone) == walk.most:
            best, low = stack, middle
        else:
            high = middle
    return best, low
