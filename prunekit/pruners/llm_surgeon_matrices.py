"""LLM Surgeon (van der Ouderaa et al., ICLR 2024, arXiv 2312.17244) as in the paper: each matrix
loses rows and columns of its own, or elements, and keeps its shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from prunekit import graph
from prunekit.architecture.matrices import elements_gone, matrix, module_name, to_out_in
from prunekit.errors import ConfigError
from prunekit.problem import Expected, Problem, expect, ranking_of
from prunekit.pruners.matrixwise import check_not_rows
from prunekit.registry import Above, LearningRate, Natural, Positive, pruners
from prunekit.scoring.kronecker import Factors, Place, kronecker_factors
from prunekit.selection.elements import NM, Pattern, check_pattern, everywhere, of_each_run
from prunekit.selection.lines import Lines, cheapest_lines, no_lines
from prunekit.solvers.llm_surgeon import (
    column_costs,
    damped_inverse,
    element_costs,
    without_columns,
    without_elements,
)
from prunekit.training.between_shots import correct
from prunekit.types import Counts, Group, Kept, Pruned

Structure = Literal["rows_and_columns", "rows", "columns", "elements"]


@dataclass(frozen=True)
class Shot:
    """What every shot does alike (see `llm_surgeon_matrices`)."""

    structure: Structure
    pattern: Pattern | None
    ridge: float
    together: int


@dataclass
class State:
    """What is left of each matrix by now: rows and columns, or with a structure of elements those
    that are `kept (outputs, inputs)`.
    """

    lines: dict[str, Lines]
    kept: dict[str, Tensor]


class Curvature(NamedTuple):
    """Factors of a matrix's inputs and outputs, and the inverses of the damped ones, over the rows
    and columns that are still there.
    """

    A: Tensor
    G: Tensor
    A_inverse: Tensor
    G_inverse: Tensor


def check_surgeon_matrices(
    problem: Problem,
    *,
    structure: Structure,
    pattern: Pattern | None,
    targets: list[str] | None,
    shots: int,
    **_: Any,
) -> Expected:
    """Raises ConfigError where the ratio cannot be met, where a pattern fits no matrix or ratio, or
    is not one of elements, or does not come in one shot.
    """
    if pattern and structure != "elements":
        raise ConfigError(
            f"pruner.pattern counts elements, and pruner.structure={structure} takes more than "
            "one at a time: pruner.structure=elements"
        )
    if pattern and shots > 1:
        raise ConfigError(
            f"pruner.shots={shots}: a pattern comes in one shot, since part of it is none: "
            "pruner.shots=1"
        )
    expected = expect(problem, problem.matrices(targets), smaller=False)
    check_pattern(problem.model, expected.groups, expected.counts, pattern)
    check_ranking(ranking_of(problem, expected), pattern)
    return expected


def check_ranking(ranking: str, pattern: Pattern | None) -> None:
    """Raises ConfigError for a ranking that this pruner, or a pattern, cannot follow."""
    check_not_rows(ranking, "llm_surgeon_matrices")
    possible = ("local",) if pattern else ("local", "global")
    if ranking not in possible:
        raise ConfigError(
            f"ratio.ranking={ranking}: pruner=llm_surgeon_matrices ranks each matrix by itself "
            f"or, without a pattern, all of them together: {' or '.join(possible)}"
        )


@pruners.register(
    paper="arXiv 2312.17244",
    year=2024,
    needs="gradients",
    out="zeros",
    check=check_surgeon_matrices,
)
def llm_surgeon_matrices(
    problem: Problem,
    *,
    structure: Structure = "rows_and_columns",
    pattern: NM = None,
    shots: Positive = 5,
    ridge: Above = 0.01,
    together: Positive = 2000,
    correction_steps: Natural = 0,
    correction_lr: LearningRate = 1e-4,
    batch: Positive | None = None,
    factors: Place = "host",
    targets: list[str] | None = None,
) -> Pruned:
    """Zeroes rows and columns, or elements, of each matrix by what they cost under a Kronecker-
    factored curvature of the loss, and moves the rest of the matrix to make up for them.

    Args:
        structure: `rows_and_columns` of a matrix compete, and their updates are added; `rows`,
            `columns`; or single `elements`.
        pattern: with elements, "2:4" keeps 2 of every 4 consecutive inputs; the ratio must agree.
        shots: the share zeroed grows linearly over so many, the curvature estimated anew for each;
            the paper takes up to 40.
        ridge: on each factor, in its mean diagonals.
        together: elements whose removal is solved for at a time.
        correction_steps: of LoRA on the calibration text after each shot but the last; 0 is none.
        correction_lr: their learning rate.
        batch: samples of a backward; null takes as many as make up 2,048 tokens.
        factors: where they wait while the text goes through: `host` memory, or the model's
            `device`. Those of one module at a time are worked with.
        targets: names or globs of the linear modules in a block; null takes all.

    With ratio=global all matrices compete (the paper), else each loses its own number; of rows and
    columns as many go as the number allows. Notes have the increase of the loss, in nats a token,
    that each shot expected, and the rows and columns that went. Raises ConfigError where a pattern
    fits no matrix or ratio.
    """
    model = problem.model
    groups = problem.matrices(targets)
    allocation = problem.allocate(groups)
    check_pattern(model, groups, allocation.counts, pattern)
    check_ranking(allocation.ranking, pattern)
    counts = {name: count for name, count in allocation.counts.items() if count}
    groups = [g for g in groups if g.name in counts]
    names = [module_name(g) for g in groups]
    pools = [groups] if allocation.ranking == "global" else [[g] for g in groups]
    how, state, increases = Shot(structure, pattern, ridge, together), State({}, {}), []
    for shot in tqdm(range(1, shots + 1) if groups else (), desc="shots", unit="shot", delay=2):
        found = kronecker_factors(model, names, problem.run(), batch=batch, place=factors)
        by_now = {name: count * shot // shots for name, count in counts.items()}
        increases.append(sum(shoot(model, pool, by_now, found, state, how) for pool in pools))
        if correction_steps and shot < shots:
            keep = graph.zero_masks(model, groups, masks(model, groups, state))
            correct(model, problem.tokens, names, keep, correction_steps, correction_lr)
    kept = masks(model, groups, state)
    notes: dict[str, Any] = {"counts": elements_gone(kept), "expected": increases}
    if state.lines:
        notes["rows_and_columns"] = {
            name: [int(x.sum()) for x in lines] for name, lines in state.lines.items()
        }
    return Pruned(model, kept, groups, {}, notes)


def masks(model: nn.Module, groups: list[Group], state: State) -> Kept:
    """What is left of each matrix by now, stored like it, in host memory."""
    return {g.name: to_out_in(model, g, state.kept[g.name]).contiguous() for g in groups}


@torch.no_grad()
def shoot(
    model: nn.Module,
    pool: list[Group],
    counts: Counts,
    factors: dict[str, Factors],
    state: State,
    how: Shot,
) -> float:
    """Zero elements of the matrices of `pool`, which compete, until as many are as `counts` says,
    the rest of each matrix making up for them. Returns what those that went cost, summed.
    """
    total = sum(counts[g.name] for g in pool)
    if how.structure == "elements":
        return shoot_elements(model, pool, total, factors, state, how)
    costs = {}
    for g in pool:
        W = matrix(model, g)
        state.lines.setdefault(g.name, no_lines(*W.shape))
        costs[g.name] = line_costs(W, curvature(g, W, factors, state, how), how)
    before = {g.name: state.lines[g.name] for g in pool}
    after = cheapest_lines(costs, before, total)
    nats = 0.0
    for g in pool:
        going = Lines(
            *(now & ~then for now, then in zip(after[g.name], before[g.name], strict=True))
        )
        nats += sum(float(c[x].sum()) for c, x in zip(costs[g.name], going, strict=True))
        state.kept[g.name] = after[g.name].kept
        if any(x.any() for x in going):
            W = matrix(model, g)
            new = without_lines(W, curvature(g, W, factors, state, how), going)
            W.copy_(new.to(W).masked_fill_(~state.kept[g.name].to(W.device), 0))
        state.lines[g.name] = after[g.name]
    return nats


def curvature(
    group: Group, weight: Tensor, factors: dict[str, Factors], state: State, how: Shot
) -> Curvature:
    """That of a matrix, on its device, as its rows and columns are."""
    found = factors[module_name(group)]
    A, G = (x.to(weight.device).double() for x in (found.inputs(False), found.outputs()))
    if group.name in state.lines:
        rows, columns = ((~x).to(A) for x in state.lines[group.name])
        A, G = A * torch.outer(columns, columns), G * torch.outer(rows, rows)
    return Curvature(A, G, damped_inverse(A, how.ridge), damped_inverse(G, how.ridge))


def line_costs(weight: Tensor, c: Curvature, how: Shot) -> tuple[Tensor, Tensor]:
    """Costs of the rows (outputs,) and the columns (inputs,), on the CPU; infinite where the
    structure does not take them.
    """
    costs = []
    sides = (("rows", weight.T, c.G_inverse, c.A), ("columns", weight, c.A_inverse, c.G))
    for axis, side, inverse, outer in sides:
        each = torch.arange(side.shape[1], device=weight.device)[:, None]
        cost = column_costs(side, inverse, outer, each).cpu()
        costs.append(cost if axis in how.structure else torch.full_like(cost, torch.inf))
    return costs[0], costs[1]


def without_lines(weight: Tensor, c: Curvature, going: Lines) -> Tensor:
    """The matrix in float64 after what the removal of rows changes and what that of columns
    changes, both told from the matrix as it was (what goes is not zero yet).
    """
    W = weight.double()
    by_rows = without_columns(W.T, c.G_inverse, going.rows.nonzero()[:, 0]).T
    by_columns = without_columns(W, c.A_inverse, going.columns.nonzero()[:, 0])
    return by_rows + by_columns - W


def shoot_elements(
    model: nn.Module,
    pool: list[Group],
    count: int,
    factors: dict[str, Factors],
    state: State,
    how: Shot,
) -> float:
    """`shoot` where single elements go."""
    costs = {}
    for g in pool:
        W = matrix(model, g)
        c = curvature(g, W, factors, state, how)
        state.kept.setdefault(g.name, torch.ones(W.shape, dtype=torch.bool))
        cost = element_costs(W, c.A_inverse, c.G_inverse).float().cpu()
        costs[g.name] = cost.masked_fill_(~state.kept[g.name], -1.0)  # they go first again
    nats = 0.0
    chosen = chosen_elements(costs, pool, count, how.pattern)
    for g in pool:
        W, kept = matrix(model, g), chosen[g.name]
        going = state.kept[g.name] & ~kept
        nats += float(costs[g.name][going].sum())
        state.kept[g.name] = kept
        if going.any():
            c = curvature(g, W, factors, state, how)
            new = without_elements(W, c.A_inverse, c.G_inverse, going.to(W.device), how.together)
            W.copy_(new.to(W).masked_fill_(~kept.to(W.device), 0))
    return nats


def chosen_elements(
    costs: dict[str, Tensor], pool: list[Group], count: int, pattern: Pattern | None
) -> Kept:
    """Masks (outputs, inputs) of what stays."""
    if pattern is None:
        return everywhere(costs, count)
    [g] = pool
    return {g.name: of_each_run(costs[g.name], pattern.kept_of(count, g.units, g.name), pattern.m)}
