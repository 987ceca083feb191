"""Score, choose and apply block by block; the next block is scored on what the pruned ones before
it put out.

The schedule of Wanda (Sun et al., ICLR 2024, arXiv 2306.11695) and SparseGPT (Frantar & Alistarh,
ICML 2023, arXiv 2301.00774), for any criterion that watches activations and any unit inside a
block.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from prunekit import graph
from prunekit.activations.blockwise import BlockRun, groups_by_block
from prunekit.activations.done_blocks import Outcome, packed, unpacked
from prunekit.activations.storage import PassOptions, Precision, Store
from prunekit.errors import ConfigError
from prunekit.graph.discovery import discovery
from prunekit.problem import Expected, Problem, check_no_loss, expect
from prunekit.registry import pruners
from prunekit.scoring.experts import expert_coverage
from prunekit.selection.units import choose
from prunekit.solvers.bias_compensation import add_biases, check_readable, lost_means
from prunekit.types import Allocation, Group, Kept, Pruned, Scores

Kinds = Annotated[list[Literal["neurons", "heads", "experts", "inner"]], Field(min_length=1)]


def check_layerwise(
    problem: Problem, *, kinds: list[str], compensate: str, remove: bool, **_: Any
) -> Expected:
    """Raises ConfigError where the ratio cannot be met or ranks groups of several blocks, where the
    criterion needs the loss, units are not inside one block, or nothing reads what a bias would
    make up for.
    """
    check_no_loss(problem, "pruner=layerwise")
    groups = problem.groups(kinds)
    groups_by_block(groups, problem.blocks())
    if compensate == "bias":
        check_readable(problem.model, groups)
    expected = expect(problem, groups, smaller=remove)
    if expected.counts is not None:
        _local(problem.allocate(expected.groups))
    return expected


def _local(allocation: Allocation) -> Allocation:
    if allocation.ranking != "local":
        raise ConfigError(
            f"ratio.ranking={allocation.ranking} needs all scores at once, and pruner=layerwise "
            "has one block's at a time: give ratio.ranking=local or pruner=oneshot"
        )
    return allocation


@pruners.register(
    paper="arXiv 2306.11695",
    year=2023,
    needs="data",
    out="self-contained",
    scored=True,
    check=check_layerwise,
)
@torch.no_grad()
def layerwise(
    problem: Problem,
    *,
    kinds: Kinds = ["heads", "neurons"],  # noqa: B006 (never mutated; the YAML states it)
    compensate: Literal["none", "bias"] = "none",
    store: Store = "memory",
    precision: Precision = "model",
    remove: bool = True,
) -> Pruned:
    """Scores a block's units on what reaches it, removes the lowest, and goes on to the next block
    with what the pruned one puts out.

    Args:
        kinds: of units that compete.
        compensate: `bias` leaves the mean output of what goes as a bias (FLAP).
        store: where the activations between two blocks wait; beyond them and the statistics of one
            block nothing is held.
        precision: `bf16` runs the forwards in bfloat16.
        remove: false zeroes the units and keeps the shapes.

    Counts come from the ratio, once, on the dense model. Experts are cut out before the next block
    is scored: a router would still send tokens to experts of zeros. Notes say how many tokens
    reached the experts of each layer. Raises ConfigError for a criterion that needs the loss, and
    for units that stand outside the blocks.
    """
    model = problem.model
    groups = problem.groups(kinds)
    allocation = _local(problem.allocate(groups))
    known = discovery(model)
    kept: Kept = {}
    first: Scores = {}
    seen: dict[str, dict[str, int]] = {}
    routed = {g.name for g in groups if g.kind == "experts"} if remove else set()

    def chosen(row: list[Group], run: BlockRun) -> Outcome:
        scores = problem.score(row, run)
        mask = choose(model, row, scores, allocation)
        lost = lost_means(model, row, mask, run) if compensate == "bias" else {}
        covered = {f"{n}:{k}": v for n, of in expert_coverage(run).items() for k, v in of.items()}
        return packed(scores=scores, mask=mask, lost=lost, seen=covered)

    options = PassOptions(store, precision)
    for row, run in problem.by_block(groups, allocation.counts, options, resumable=True):
        found = run.once(partial(chosen, row, run))
        scores, mask, lost = (unpacked(found, part) for part in ("scores", "mask", "lost"))
        graph.remove(model, {n: m for n, m in mask.items() if n in routed}, known=known)
        graph.zero(model, {n: m for n, m in mask.items() if n not in routed}, known)
        add_biases(model, lost)
        for name, number in unpacked(found, "seen").items():
            group, _, what = name.rpartition(":")
            seen.setdefault(group, {})[what] = int(number)
        kept |= mask
        first |= scores
    if remove:
        graph.remove(model, {n: m for n, m in kept.items() if n not in routed}, known=known)
    notes: dict[str, Any] = {"counts": allocation.counts} | ({"experts_seen": seen} if seen else {})
    return Pruned(model, kept, groups, first, notes)
