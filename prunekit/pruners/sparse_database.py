"""A choice among the sparsities of single matrices (EvoPress, arXiv 2410.14649): every linear
matrix is solved once by SparseGPT at a few levels, the ratio says which of them to take.

As with `pruner=database`, the pruner owns the solutions and hands them to the ratio as
`problem.solutions`: every way of choosing sees the same ones, and none of them solves anything.
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Annotated

import torch
from pydantic import AfterValidator, Field

from prunekit.activations.storage import PassOptions, Precision, Store
from prunekit.errors import ConfigError
from prunekit.problem import Expected, Problem, expect, ranking_of
from prunekit.pruners.columnwise import prune_columns
from prunekit.pruners.matrixwise import Ridge, check_local, warn_by_matrix, write
from prunekit.registry import Positive, Share, pruners
from prunekit.solvers.sparse_levels import SparseLevels
from prunekit.types import Counts, Group, Kept, Pruned


def ascending(levels: list[float]) -> list[float]:
    """Raises ValueError for levels that do not begin with 0, or do not grow."""
    if levels[0] != 0 or any(a >= b for a, b in pairwise(levels)):
        raise ValueError(f"{levels} must begin with 0 and grow, e.g. [0, 0.5, 0.7]")
    return levels


Levels = Annotated[list[Share], Field(min_length=2), AfterValidator(ascending)]


def check_sparse_database(
    problem: Problem,
    *,
    levels: list[float],
    refit: bool,
    block: int,
    ridge: float,
    targets: list[str] | None,
    store: Store,
    precision: Precision,
) -> Expected:
    """Raises ConfigError where the ratio cannot be met."""
    groups = problem.matrices(targets)
    passes = PassOptions(store, precision)
    found = sparse_levels(problem, groups, levels, block, ridge, passes)
    asked = dataclasses.replace(problem, solutions=found)
    expected = expect(asked, groups, smaller=False)
    check_local(ranking_of(asked, expected), "sparse_database")
    if expected.counts is not None and not refit:
        check_levels(found, groups, expected.counts)
    return dataclasses.replace(expected, remark=f"{expected.remark} {found.remark()}".strip())


def check_levels(found: SparseLevels, groups: list[Group], counts: Counts) -> None:
    """Raises ConfigError for a matrix that should lose more than its highest level does."""
    over = next((g for g in groups if counts[g.name] > found.most(g)), None)
    if over is not None:
        raise ConfigError(
            f"pruner.refit=false takes solutions as they are, of which the highest lacks "
            f"{found.levels[-1]} of a matrix, and the ratio takes "
            f"{counts[over.name] / over.units:.4g} of {over.name}: give a higher last level, a "
            "smaller ratio, or pruner.refit=true"
        )


def sparse_levels(
    problem: Problem,
    groups: list[Group],
    levels: list[float],
    block: int,
    ridge: float,
    options: PassOptions,
) -> SparseLevels:
    """The database that these options describe; nothing is solved yet."""
    return SparseLevels(
        model=problem.model,
        blocks=problem.blocks(),
        tokens=lambda: problem.tokens,
        options=options,
        remember=problem.remember,
        wanted=groups,
        levels=levels,
        block=block,
        ridge=ridge,
    )


@pruners.register(
    paper="arXiv 2410.14649, 2301.00774",
    year=2024,
    needs="data",
    out="zeros",
    check=check_sparse_database,
)
@torch.no_grad()
def sparse_database(
    problem: Problem,
    *,
    levels: Levels = [0.0, 0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],  # noqa: B006 (never mutated)
    refit: bool = True,
    block: Positive = 128,
    ridge: Ridge = 0.01,
    targets: list[str] | None = None,
    store: Store = "memory",
    precision: Precision = "model",
) -> Pruned:
    """Solves every linear matrix once by SparseGPT at a few sparsities, lets the ratio choose among
    them, and prunes the choice block by block.

    Args:
        levels: shares of a matrix's elements that go, ascending from 0.
        refit: so many elements as the ratio chose go as `pruner=sparsegpt` takes them, each block
            on what the pruned ones before it put out; false takes the solutions as they lie in the
            database, and a count between two levels goes down to the lower one.
        block: inputs among whose elements those with the least `w^2 / U_jj^2` go.
        ridge: in units of the gram's mean diagonal; it grows, with a warning, where rounding leaves
            no Cholesky factor.
        targets: names or globs of the linear modules in a block; null takes all.
        store: where activations between blocks wait; with `disk` the solutions wait in files too.
        precision: of the forwards.

    A level's local error is the squared error of the matrix's output relative to the dense output,
    on the inputs that the dense model gives. Refitted, a search takes its target to the element.
    The database lies in the cache, one entry a matrix, so a run that was cut off goes on with the
    next one and another ratio solves nothing anew. Of a database larger than the cache
    (PRUNEKIT_CACHE_GIB, 2; `prunekit plan` says its size) the oldest entries go. Ratios that know
    nothing of levels (`uniform`, `owl`) need none with refit=true, and nothing is solved then.
    Raises ConfigError for a ratio that ranks matrices together, and for a budget of which zeros
    save nothing.
    """
    model, groups = problem.model, problem.matrices(targets)
    warn_by_matrix(problem, groups)
    passes = PassOptions(store, precision)
    found = sparse_levels(problem, groups, levels, block, ridge, passes)
    allocation = dataclasses.replace(problem, solutions=found).allocate(groups)
    check_local(allocation.ranking, "sparse_database")
    counts, kept, notes = allocation.counts, {}, dict(allocation.notes)
    if refit:
        columns = prune_columns(
            problem, groups, counts, pattern=None, block=block, ridge=ridge, options=passes
        )
        kept, notes = columns.kept, notes | columns.notes()
    elif any(counts.values()):
        check_levels(found, groups, counts)
        counts = found.at_levels(counts)
        kept = take(problem, found, groups, counts)
        notes |= {"counts": counts, "larger_ridge": found.grown()}
    if allocation.measure is not None:
        notes["budget"] = {**notes["budget"], "measured": allocation.measure(model)}
    return Pruned(model, kept, groups, {}, notes)


def take(problem: Problem, found: SparseLevels, groups: list[Group], counts: Counts) -> Kept:
    """Puts the solutions of these levels into the model. Returns the masks of what stays."""
    losing = [g for g in groups if counts[g.name]]
    return {g.name: write(problem.model, g, *found.level(g, counts[g.name])) for g in losing}
