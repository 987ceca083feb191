"""A choice among local solutions (ZipLM, arXiv 2302.04089; EvoPress, arXiv 2410.14649; Puzzle,
arXiv 2411.19146): every sub-layer is solved once by structured OBS at a few levels, the ratio says
which of them to take, whole sub-layers among them.

The pruner owns the database and hands it to the ratio as `problem.solutions`. So the options of
what is solved stand in one place, every way of choosing (`ratio=milp`, `evolution`, `predictor`,
`random`) sees the same solutions and none of them solves anything, and ratios that know nothing of
levels (`uniform`, `cost`) serve as well.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from prunekit import graph
from prunekit.activations.dense_reference import UnitReader, check_readers
from prunekit.activations.storage import PassOptions, Precision, Store
from prunekit.checkpoint.remote_code.runtime_modules import Bypass, insert
from prunekit.problem import Expected, Problem, expect
from prunekit.pruners.structured_obs import (
    Kinds,
    Tokens,
    check_samples,
    local_allocation,
    read_groups,
    readers_of,
    refit_blocks,
    regression,
)
from prunekit.registry import pruners
from prunekit.solvers.local_solutions import ObsLevels
from prunekit.solvers.obs_levels import LevelOptions
from prunekit.types import Group, Kept, Pruned

Several = Annotated[int, Field(ge=2, le=1024)]


def check_database(problem: Problem, *, kinds: list[str], **options: Any) -> Expected:
    """Raises ConfigError where the ratio cannot be met, or units have no reader."""
    groups = problem.groups(kinds)
    readers = readers_of(problem)
    check_readers(groups, readers)
    levels = local_solutions(problem, readers, groups, **options)
    asked = dataclasses.replace(problem, solutions=levels)
    expected = expect(asked, groups)
    if expected.counts is not None:
        local_allocation(asked, groups, "database")
    return dataclasses.replace(expected, remark=f"{expected.remark} {levels.remark()}".strip())


def local_solutions(
    problem: Problem,
    readers: list[list[UnitReader]],
    groups: list[Group],
    *,
    levels: int,
    whole: bool,
    bias: bool,
    token_weight: Literal["relative", "equal"],
    ridge: float | Literal["auto"],
    store: Store,
    precision: Precision,
    **_: Any,
) -> ObsLevels:
    """The database that these options of `database` describe; nothing is solved yet."""
    return ObsLevels(
        model=problem.model,
        blocks=problem.blocks(),
        readers=readers,
        wanted=groups,
        tokens=lambda: problem.tokens,
        how=LevelOptions(
            levels=levels,
            whole=whole,
            bias=bias,
            relative=token_weight == "relative",
            ridge=None if ridge == "auto" else ridge,
        ),
        options=PassOptions(store, precision),
        remember=problem.remember,
    )


@pruners.register(
    paper="arXiv 2302.04089, 2410.14649, 2411.19146",
    year=2024,
    needs="data",
    out="self-contained",
    check=check_database,
)
@torch.no_grad()
def database(
    problem: Problem,
    *,
    kinds: Kinds = ["heads", "neurons"],  # noqa: B006 (never mutated; the YAML states it)
    levels: Several = 8,
    whole: bool = True,
    refit: bool = True,
    target: Literal["own", "dense"] = "own",
    bias: bool = True,
    token_weight: Literal["relative", "equal"] = "relative",
    ridge: Tokens | Literal["auto"] = "auto",
    dense_ridge: Tokens | Literal["auto"] = "auto",
    store: Store = "memory",
    precision: Precision = "fast",
) -> Pruned:
    """Solves every sub-layer once by structured OBS at a few levels, lets the ratio choose among
    them, and refits the choice block by block.

    Args:
        kinds: of units that may go.
        levels: parts into which the units of a sub-layer are divided; level k lacks k of them.
        whole: a sub-layer itself may go, where a module can stand in its place.
        refit: what the ratio chose is removed as `pruner=obs` does, each block on what the pruned
            ones before it put out; false takes the solutions as they lie in the database, and a
            count between two levels goes down to the lower one.
        target: of the refit, as in `pruner=obs`; solutions keep the readers' own outputs.
        bias: gives the readers a bias.
        token_weight: how much a token's error counts: relative to the token's size, or equally.
        ridge: tokens that hold the readers near their dense weights; `auto` lets samples choose.
        dense_ridge: likewise for what moves the outputs, with target=dense.
        store: where activations between blocks wait; with `disk` the solutions wait in files too.
        precision: of the forwards; sums are float32, solutions float64 either way.

    The database lies in the cache, one entry a sub-layer, so a run that was cut off goes on with
    the next one and another ratio solves nothing anew. Of a database larger than the cache
    (PRUNEKIT_CACHE_GIB, 2; `prunekit plan` says its size) the oldest entries go. Notes have the
    levels that were taken. Nothing changes where the ratio removes nothing. Raises ConfigError for
    units that no linear module of a block reads, and for a single sample where a ridge is to be
    chosen.
    """
    model = problem.model
    groups, readers = read_groups(problem, kinds)
    how = regression(target, bias, token_weight, ridge, dense_ridge)
    check_samples("database", how, problem.tokens)
    passes = PassOptions(store, precision)
    found = local_solutions(
        problem,
        readers,
        groups,
        levels=levels,
        whole=whole,
        bias=bias,
        token_weight=token_weight,
        ridge=ridge,
        store=store,
        precision=precision,
    )
    asked = dataclasses.replace(problem, solutions=found)
    allocation = local_allocation(asked, groups, "database")
    counts = allocation.counts if refit else found.at_levels(allocation.counts)
    notes: dict[str, Any] = {"counts": counts, **allocation.notes}
    if not any(counts.values()):
        return Pruned(model, {}, groups, {}, notes)
    stand_ins = found.stand_ins(counts)  # known of the dense model alone
    if refit:
        kept, more = refit_blocks(problem, readers, counts, how, passes)
        notes |= more
    else:
        kept = found.put_in(counts)
    remove(problem, readers, kept, stand_ins)
    if allocation.measure is not None:
        notes["budget"] = {**notes["budget"], "measured": allocation.measure(model)}
    return Pruned(model, kept, groups, {}, notes)


def remove(
    problem: Problem, readers: list[list[UnitReader]], kept: Kept, stand_ins: dict[str, int]
) -> None:
    """Cut the units out, and put a module that adds nothing where a sub-layer lost all of them."""
    graph.remove(problem.model, {n: mask for n, mask in kept.items() if n not in stand_ins})
    for block, row in zip(problem.blocks(), readers, strict=True):
        for r in row:
            if r.group.name in stand_ins:
                path = f"{block}.{r.inside}".rpartition(".")[0]
                insert(problem.model, path, Bypass(stand_ins[r.group.name]))
