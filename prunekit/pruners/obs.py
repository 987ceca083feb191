"""Structured optimal brain surgeon, block by block (ZipLM, Kurtic et al., NeurIPS 2023, arXiv
2302.04089; SlimGPT, arXiv 2412.18110).

Heads and neurons go one at a time, the one whose removal costs least by `tr(W_S (H^-1_SS)^-1
W_S^T)` first; what remains of the module that reads them (`o_proj`, `down_proj`) is then the least
squares map, in closed form. Beyond the papers, each as an option: the map aims at the dense
network's residual stream instead of the module's own former output, so that a block repairs what
earlier ones broke; it has a bias; errors count relative to the size of the token's residual stream.
Where the parameters of a budget cost least is `ratio=cost`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from tqdm import tqdm

from prunekit import graph
from prunekit.activations.blockwise import capture_inputs
from prunekit.activations.dense_reference import (
    PairedStreams,
    UnitReader,
    check_readers,
    is_residual_sum,
    readers_by_block,
)
from prunekit.activations.gram import GramStatistics, added, warn_of_little_text
from prunekit.activations.storage import PassOptions, Precision, Store
from prunekit.errors import ConfigError
from prunekit.problem import Expected, Problem, expect
from prunekit.registry import pruners
from prunekit.solvers.bias_compensation import add_biases
from prunekit.solvers.least_squares import prior_ridge, ridge_problem
from prunekit.solvers.obs import greedy_removal
from prunekit.solvers.validated_ridge import Ridges, validated
from prunekit.types import Counts, Group, Kept, Pruned, tensor_of

Kinds = Annotated[list[Literal["heads", "neurons"]], Field(min_length=1)]

FOLDS = 2
"""Parts of the text, each of which judges what is fitted to the others."""
DENSE_START = 32768.0
"""Where the choice of `dense_ridge` begins, in tokens."""
Tokens = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class Regression:
    """The options that say which regression is solved (see `obs`)."""

    target: Literal["own", "dense"]
    bias: bool
    relative: bool
    ridge: float | None
    dense_ridge: float | None
    """Tokens; None = chosen by text that was not fitted to."""

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


def check_obs(problem: Problem, *, kinds: list[str], **_: Any) -> Expected:
    """Raises ConfigError where the ratio cannot be met, or units have no reader."""
    expected = expect(problem, problem.groups(kinds))
    check_readers(expected.groups, _readers(problem))
    if expected.counts is not None:
        _counts(problem, expected.groups)
    return expected


def _readers(problem: Problem) -> list[list[UnitReader]]:
    return readers_by_block(problem.model, problem.blocks(), problem.everything())


def _counts(problem: Problem, groups: list[Group]) -> Counts:
    allocation = problem.allocate(groups)
    if allocation.ranking != "local":
        raise ConfigError(
            f"ratio.ranking={allocation.ranking}: pruner=obs sees one block at a time; ratio=cost "
            "spends the parameters wherever they cost least"
        )
    return allocation.counts


@pruners.register(
    paper="arXiv 2302.04089, 2412.18110",
    year=2024,
    needs="data",
    out="self-contained",
    check=check_obs,
)
@torch.no_grad()
def obs(
    problem: Problem,
    *,
    kinds: Kinds = ["heads", "neurons"],  # noqa: B006 (never mutated; the YAML states it)
    target: Literal["own", "dense"] = "own",
    bias: bool = True,
    token_weight: Literal["relative", "equal"] = "relative",
    ridge: Tokens | Literal["auto"] = "auto",
    dense_ridge: Tokens | Literal["auto"] = "auto",
    store: Store = "memory",
    precision: Precision = "fast",
) -> Pruned:
    """Removes heads and neurons by their exact quadratic cost and refits the modules that read them
    in closed form, block by block.

    Args:
        kinds: of units that may go.
        target: `own` keeps the readers' outputs where they are; `dense` moves the residual stream
            back to the dense network's.
        bias: gives the readers a bias.
        token_weight: how much a token's error counts: relative to the token's size, or equally.
        ridge: tokens that hold the readers near their dense weights; `auto` takes for each reader
            the number that does best on the half of the samples that it is not fitted to.
        dense_ridge: likewise for what moves the outputs, with target=dense.
        store: where activations between blocks wait.
        precision: of the forwards; sums are float32, solutions float64 either way.

    Notes say the ridges of each reader. Nothing changes where the ratio removes nothing. Raises
    ConfigError for units that no linear module of a block reads, and for a single sample where a
    ridge is to be chosen.
    """
    model = problem.model
    groups = problem.groups(kinds)
    readers = _readers(problem)
    check_readers(groups, readers)
    inputs = {r.reader.name: r.reader.weight.shape[1] for row in readers for r in row}
    warn_of_little_text(problem.tokens, inputs)
    counts = _counts(problem, groups)
    if not any(counts.values()):
        return Pruned(model, {}, groups, {}, {"counts": counts})
    how = Regression(
        target,
        bias,
        token_weight == "relative",
        None if ridge == "auto" else ridge,
        None if dense_ridge == "auto" else dense_ridge,
    )
    if how.chosen and len(problem.tokens) < FOLDS:
        raise ConfigError(
            f"pruner=obs chooses {', '.join(how.chosen)} by samples that are not fitted to, and "
            "there is one sample: give calib.samples=2 or more, or a number"
        )
    kept, notes = _refit_blocks(problem, readers, counts, how, PassOptions(store, precision))
    graph.remove(model, kept)
    return Pruned(model, kept, groups, {}, {"counts": counts, **notes})


def _refit_blocks(
    problem: Problem,
    readers: list[list[UnitReader]],
    counts: Counts,
    how: Regression,
    options: PassOptions,
) -> tuple[Kept, dict[str, Any]]:
    """Choose, zero and refit block by block; the units are cut out afterwards, all at once.

    Returns the choice and notes.
    """
    model, blocks = problem.model, problem.blocks()
    own, feed = capture_inputs(model, blocks, problem.tokens, options)
    dense = own.clone() if how.target == "dense" else None
    kept: Kept = {}
    apart: list[str] = []
    ridges: dict[str, list[float]] = {}
    folds = FOLDS if how.chosen else 1
    for b, row in enumerate(tqdm(readers, desc="structured OBS", unit="block")):
        module = model.get_submodule(blocks[b])
        before = copy.deepcopy(module) if dense is not None else module
        names = [r.inside for r in row]
        sums = is_residual_sum(feed, b, before, dense or own, names)
        streams = PairedStreams(feed, b, names, before, dense, own, sums)
        if not streams.adds:
            apart.append(blocks[b])
        for r in row:
            if counts.get(r.group.name):
                stats = streams.regression(module, r, how.relative, folds)
                mask, used = _prune_reader(model, r, stats, counts[r.group.name], how)
                kept[r.group.name] = mask
                ridges[r.reader.name] = [used.ridge]
                if dense is not None:
                    ridges[r.reader.name].append(used.dense_ridge)
        if b + 1 < len(blocks):
            streams.advance(module)
    return kept, {"apart": apart, "ridges": ridges}


def _prune_reader(
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
    stays = torch.ones(len(task.gram), dtype=torch.bool)
    stays[units[~mask].flatten()] = False
    columns = stays.nonzero()[:, 0].to(reader.weight.device)
    if how.chosen:
        ridges = validated(folds, reader.weight, columns, how.bias, ridges, how.chosen)
        task = ridge_problem(stats, reader.weight, ridges.ridge, how.bias, ridges.dense_ridge)
    A, b = task.solve(columns)
    for m in r.group.members:
        tensor = tensor_of(model, m.param)
        if isinstance(tensor, nn.Parameter):
            tensor.index_fill_(m.axis, m.index[~mask].flatten().to(tensor.device), 0)
    reader.weight[:, columns] = A.to(reader.weight)
    if b is not None:
        add_biases(model, {reader.name: b})
    return mask, ridges
