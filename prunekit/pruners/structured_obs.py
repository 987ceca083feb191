"""The pass of structured OBS over the blocks, shared by the pruners whose counts are known by then:
choose, zero and refit, each block on what the pruned ones before it put out.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from tqdm import tqdm

from prunekit.activations.block_inputs import capture_inputs
from prunekit.activations.blockwise import BlockRun
from prunekit.activations.dense_reference import (
    PairedStreams,
    UnitReader,
    check_readers,
    is_residual_sum,
    readers_by_block,
)
from prunekit.activations.done_blocks import Outcome, packed, unpacked
from prunekit.activations.gram import GramStatistics, added, warn_of_little_text
from prunekit.activations.storage import PassOptions
from prunekit.architecture.streaming import turn
from prunekit.errors import ConfigError
from prunekit.problem import Problem
from prunekit.solvers.bias_compensation import add_biases, set_bias
from prunekit.solvers.least_squares import prior_ridge, ridge_problem
from prunekit.solvers.obs import columns_left, greedy_removal
from prunekit.solvers.validated_ridge import FOLDS, Ridges, refitted
from prunekit.types import Allocation, Counts, Group, Kept, tensor_of

Kinds = Annotated[list[Literal["heads", "neurons"]], Field(min_length=1)]
DENSE_START = 32768.0
"""Where the choice of `dense_ridge` begins, in tokens."""
Tokens = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class Regression:
    """Which regression is solved, as the options of `pruner=obs` say it.

    Attributes:
        relative: a token's error counts relative to its size.
        ridge: in tokens; None = chosen by text that is not fitted to.
        dense_ridge: likewise.
    """

    target: Literal["own", "dense"]
    bias: bool
    relative: bool
    ridge: float | None
    dense_ridge: float | None

    @property
    def chosen(self) -> list[str]:
        """The ridges that text chooses."""
        names = ["ridge"] + (["dense_ridge"] if self.target == "dense" else [])
        return [name for name in names if getattr(self, name) is None]

    def start(self, inputs: int) -> Ridges:
        """Those that are given, and where the others begin."""
        return Ridges(
            prior_ridge(inputs) if self.ridge is None else self.ridge,
            DENSE_START if self.dense_ridge is None else self.dense_ridge,
        )


def regression(
    target: Literal["own", "dense"],
    bias: bool,
    token_weight: Literal["relative", "equal"],
    ridge: float | Literal["auto"],
    dense_ridge: float | Literal["auto"],
) -> Regression:
    """The options as they stand in a YAML, read."""
    return Regression(
        target,
        bias,
        relative=token_weight == "relative",
        ridge=None if ridge == "auto" else ridge,
        dense_ridge=None if dense_ridge == "auto" else dense_ridge,
    )


def check_samples(pruner: str, how: Regression, tokens: Tensor) -> None:
    """Raises ConfigError where a ridge is to be chosen by samples, and there is one sample."""
    if how.chosen and len(tokens) < FOLDS:
        raise ConfigError(
            f"pruner={pruner} chooses {', '.join(how.chosen)} by samples that are not fitted to, "
            "and there is one sample: give calib.samples=2 or more, or a number"
        )


def readers_of(problem: Problem) -> list[list[UnitReader]]:
    """The readers of heads and neurons in each block."""
    return readers_by_block(problem.model, problem.blocks(), problem.everything())


def read_groups(
    problem: Problem, kinds: Sequence[str]
) -> tuple[list[Group], list[list[UnitReader]]]:
    """The groups that may lose units, and the readers of all in each block. Warns of readers with
    more inputs than there are tokens. Raises ConfigError for groups without a reader.
    """
    groups, readers = problem.groups(kinds), readers_of(problem)
    check_readers(groups, readers)
    inputs = {r.reader.name: r.reader.weight.shape[1] for row in readers for r in row}
    warn_of_little_text(problem.tokens, inputs)
    return groups, readers


def local_allocation(problem: Problem, groups: list[Group], pruner: str) -> Allocation:
    """What the ratio answers. Raises ConfigError for counts that groups would exchange."""
    allocation = problem.allocate(groups)
    if allocation.ranking != "local":
        raise ConfigError(
            f"ratio.ranking={allocation.ranking}: pruner={pruner} sees one block at a time; "
            "ratio=cost spends the parameters wherever they cost least"
        )
    return allocation


def refit_blocks(
    problem: Problem,
    readers: list[list[UnitReader]],
    counts: Counts,
    how: Regression,
    options: PassOptions,
) -> tuple[Kept, dict[str, Any]]:
    """Choose, zero and refit block by block; the units are cut out afterwards, all at once. A group
    that loses all its units gives nothing from then on. Cut off, the pass goes on with the block at
    which it was.

    Returns the choice and notes.
    """
    model, blocks = problem.model, problem.blocks()
    own, feed = capture_inputs(model, blocks, problem.tokens, options)
    dense = own.clone() if how.target == "dense" else None
    flows = [own] if dense is None else [own, dense]
    done = problem.done_blocks()
    start = done.begin(feed.rows, *flows) if done else 0
    found = [put_back(row, done.again(model, b)) for b, row in enumerate(readers[:start]) if done]
    bar = tqdm(
        readers[start:], desc="structured OBS", total=len(blocks), initial=start, unit="block"
    )
    for b, row in enumerate(bar, start):
        run = BlockRun(model, problem.tokens, feed, b, own, done)
        with turn(run.module):
            before = copy.deepcopy(run.module) if dense is not None else run.module
            names = [r.inside for r in row]
            sums = is_residual_sum(feed, b, before, dense or own, names)
            streams = PairedStreams(feed, b, names, before, dense, own, sums)
            gone = [r for r in row if counts.get(r.group.name)]
            refit = partial(refit_block, model, streams, gone, counts, how)
            found.append(run.once(refit, [r.reader.member.param for r in gone]))
            if b + 1 < len(blocks):
                streams.advance(run.module)
        if done and b + 1 < len(blocks):
            done.advance(model, b + 1, feed.rows, *flows)
    return collected(found)


def refit_block(
    model: nn.Module, streams: PairedStreams, row: list[UnitReader], counts: Counts, how: Regression
) -> Outcome:
    """Choose, zero and refit what `row` reads, one after the other, in place. What came of it:
    masks of units, the readers' biases and ridges, and whether the block is no residual sum.
    """
    block = streams.feed.blocks[streams.block]
    kept, ridges = {}, {}
    for r in row:
        if counts[r.group.name] == r.group.units:
            kept[r.group.name] = torch.zeros(r.group.units, dtype=torch.bool)
            silence(r)
            continue
        folds = FOLDS if how.chosen else 1
        stats = streams.regression(model.get_submodule(block), r, how.relative, folds)
        kept[r.group.name], used = prune_reader(model, r, stats, counts[r.group.name], how)
        both = [used.ridge] if streams.dense is None else [used.ridge, used.dense_ridge]
        ridges[r.reader.name] = torch.tensor(both, dtype=torch.float64)
    biases: dict[str, Any] = {r.reader.name: r.reader.module.bias for r in row}
    return packed(
        mask=kept,
        bias={name: b.detach().clone() for name, b in biases.items() if b is not None},
        ridges=ridges,
        apart={} if streams.adds else {block: True},
    )


def put_back(row: list[UnitReader], outcome: Outcome) -> Outcome:
    """The outcome, once the readers have their biases; their weights are in place, and units that
    do not stay are about to be cut out.
    """
    for r in row:
        bias = unpacked(outcome, "bias").get(r.reader.name)
        if bias is not None:
            set_bias(r.reader.module, bias)
    return outcome


def collected(outcomes: list[Outcome]) -> tuple[Kept, dict[str, Any]]:
    """The masks of all blocks, and the notes."""
    kept: Kept = {}
    ridges: dict[str, list[float]] = {}
    apart: list[str] = []
    for outcome in outcomes:
        kept |= unpacked(outcome, "mask")
        ridges |= {name: both.tolist() for name, both in unpacked(outcome, "ridges").items()}
        apart += unpacked(outcome, "apart")
    return kept, {"apart": apart, "ridges": ridges}


def silence(r: UnitReader) -> None:
    """The reader puts out zeros."""
    r.reader.weight.zero_()
    if r.reader.module.bias is not None:
        r.reader.module.bias.zero_()  # type: ignore[operator]


def prune_reader(
    model: nn.Module, r: UnitReader, folds: list[GramStatistics], count: int, how: Regression
) -> tuple[Tensor, Ridges]:
    """Zero `count` units and refit their reader to the others, in place. Returns the mask of the
    units that stay, and the ridges.
    """
    reader, units, stats = r.reader, r.reader.member.index, added(folds)
    ridges = how.start(len(stats.gram))
    task = ridge_problem(stats, reader.weight, ridges.ridge, how.bias, ridges.dense_ridge)
    mask = torch.ones(r.group.units, dtype=torch.bool)
    order, _ = greedy_removal(task.best, task.inverse(), units, count)
    mask[order] = False
    columns = columns_left(units, mask, len(task.gram)).to(reader.weight.device)
    A, b, ridges = refitted(folds, reader.weight, columns, how.bias, ridges, how.chosen)
    for m in r.group.members:
        tensor = tensor_of(model, m.param)
        if isinstance(tensor, nn.Parameter):
            tensor.index_fill_(m.axis, m.index[~mask].flatten().to(tensor.device), 0)
    reader.weight[:, columns] = A.to(reader.weight)
    if b is not None:
        add_biases(model, {reader.name: b})
    return mask, ridges
