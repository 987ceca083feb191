"""LLM Surgeon (van der Ouderaa et al., ICLR 2024, arXiv 2312.17244) on coupled units: heads and
neurons go by what the loss's curvature says of them, in several shots, and what remains of the
module that reads them makes up for them.

The paper zeroes rows and columns of each matrix by itself. Here the units are those of discovery,
so that they can be cut out: the columns that read a unit go with the rows that make it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from tqdm import tqdm

from prunekit import graph
from prunekit.architecture.blocks import linear_names
from prunekit.architecture.linear import check_read, makes, readers, weight_of
from prunekit.architecture.sizes import Sizes
from prunekit.errors import ConfigError
from prunekit.problem import Expected, Problem, expect
from prunekit.registry import Above, LearningRate, Natural, Positive, pruners
from prunekit.scoring.kronecker import Factors, Place, kronecker_factors
from prunekit.selection.units import choose
from prunekit.solvers.bias_compensation import add_biases
from prunekit.solvers.llm_surgeon import column_costs, damped_inverse, without_columns
from prunekit.training.between_shots import correct
from prunekit.types import Allocation, Group, Kept, Pruned, Scores

Kinds = Annotated[list[Literal["heads", "neurons"]], Field(min_length=1)]


@dataclass(frozen=True)
class Shot:
    """What every shot does alike (see `llm_surgeon`)."""

    cost: Literal["reader", "group"]
    per: Literal["parameter", "unit"]
    bias: bool
    ridge: float
    batch: int | None
    factors: Place


@dataclass
class State:
    """The groups, and what is left by now: of their units, and of the channels that each reader
    reads.
    """

    groups: list[Group]
    kept: Kept = field(default_factory=dict)
    alive: dict[str, Tensor] = field(default_factory=dict)


def check_surgeon(
    problem: Problem, *, kinds: list[str], shots: int, remove: bool, **_: Any
) -> Expected:
    """Raises ConfigError where the ratio cannot be met, where no linear module reads the units, and
    for more shots than there are units to take.
    """
    expected = expect(problem, problem.groups(kinds), smaller=remove)
    check_read(problem.model, expected.groups, "llm_surgeon")
    total = sum((expected.counts or {}).values())
    if total and shots > total:
        raise ConfigError(f"pruner.shots={shots}: {total} units go in all, so at most {total}")
    return expected


@pruners.register(
    paper="arXiv 2312.17244",
    year=2024,
    needs="gradients",
    out="self-contained",
    check=check_surgeon,
)
def llm_surgeon(
    problem: Problem,
    *,
    kinds: Kinds = ["heads", "neurons"],  # noqa: B006 (never mutated; the YAML states it)
    shots: Positive = 5,
    cost: Literal["reader", "group"] = "reader",
    per: Literal["parameter", "unit"] = "parameter",
    bias: bool = True,
    ridge: Above = 0.01,
    batch: Positive | None = None,
    factors: Place = "host",
    correction_steps: Natural = 0,
    correction_lr: LearningRate = 1e-4,
    remove: bool = True,
) -> Pruned:
    """Removes heads and neurons by what they cost under a Kronecker-factored curvature of the loss,
    estimated anew for each of several shots, and refits the modules that read them.

    Args:
        kinds: of units that may go.
        shots: the share removed grows linearly over so many; the paper takes up to 40.
        cost: `reader` of the columns that read a unit; `group` adds that of the rows that make it.
        per: what ratio=global compares: the cost of a parameter, or that of a unit (the paper,
            whose units are alike).
        bias: gives the readers a bias that makes up as well.
        ridge: on each factor, in its mean diagonals.
        batch: samples of a backward; null takes as many as make up 2,048 tokens.
        factors: where they wait while the text goes through: `host` memory, or the model's
            `device`. Those of one module at a time are worked with.
        correction_steps: of LoRA on the calibration text after each shot but the last; 0 is none.
        correction_lr: their learning rate.
        remove: false zeroes instead of removing.

    Notes have the increase of the loss, in nats a token, that each shot expected. Nothing changes
    where the ratio removes nothing. Raises ConfigError for units that no linear module reads.
    """
    model = problem.model
    expected = check_surgeon(problem, kinds=list(kinds), shots=shots, remove=remove)
    state = State(expected.groups)
    allocation = problem.allocate(state.groups)
    counts = allocation.counts
    if allocation.empty:
        return Pruned(model, {}, state.groups, {}, {"counts": counts})
    how = Shot(cost, per, bias, ridge, batch, factors)
    first: Scores = {}
    increases = []
    for shot in tqdm(range(1, shots + 1), desc="shots", unit="shot", delay=2):
        by_now = {name: count * shot // shots for name, count in counts.items()}
        scores, nats = shoot(problem, state, dataclasses.replace(allocation, counts=by_now), how)
        first = first or scores
        increases.append(nats)
        if correction_steps and shot < shots:
            names, keep = linear_names(model), graph.zero_masks(model, state.groups, state.kept)
            correct(model, problem.tokens, names, keep, correction_steps, correction_lr)
    if remove:
        graph.remove(model, state.kept)
    return Pruned(model, state.kept, state.groups, first, {"counts": counts, "expected": increases})


def shoot(
    problem: Problem, state: State, allocation: Allocation, how: Shot
) -> tuple[Scores, float]:
    """Zero units until as many are as `allocation` says, their readers refitted. Returns the costs
    of all units as they were, and of those that went, summed.
    """
    model, groups = problem.model, state.groups
    names = {r.name: None for g in groups for r in readers(model, g)}
    if how.cost == "group":
        names |= {name: None for g in groups for name, _ in writers(model, g)}
    factors = kronecker_factors(model, names, problem.run(), batch=how.batch, place=how.factors)
    costs = {g.name: unit_costs(model, g, factors, state, how) for g in groups}
    sizes = Sizes(model, groups)
    scores = {}
    for g in groups:
        size = sizes.removed({g.name: 1}) if how.per == "parameter" else 1
        # Units that went already go first again.
        scores[g.name] = torch.where(left(state, g), costs[g.name] / size, -1.0)
    kept = choose(model, groups, scores, allocation)
    nats = 0.0
    for g in groups:
        going = left(state, g) & ~kept[g.name]
        nats += float(costs[g.name][going].sum())
        if going.any():
            refit(model, g, going, factors, state, how)
    graph.zero(model, kept)
    state.kept = kept
    return costs, nats


def left(state: State, group: Group) -> Tensor:
    """(U,) bool: units that are there by now."""
    return state.kept.get(group.name, torch.ones(group.units, dtype=torch.bool))


def writers(model: nn.Module, group: Group) -> Iterator[tuple[str, Tensor]]:
    """Linear modules that make the units, and the rows (U, width) that each unit has there."""
    rows: dict[str, list[Tensor]] = {}
    for m in group.members:
        if makes(model, m):
            rows.setdefault(m.param.removesuffix(".weight"), []).append(m.index)
    for name, index in rows.items():
        yield name, torch.cat(index, 1)


def affine_weight(module: nn.Module, affine: bool) -> Tensor:
    """(outputs, inputs [+ 1]) float64: with `affine` the bias is the last column."""
    weight = weight_of(module).detach().double()
    if not affine:
        return weight
    bias = weight.new_zeros(len(weight)) if module.bias is None else module.bias.detach().double()  # type: ignore[operator]
    return torch.cat([weight, bias[:, None]], 1)


def reader_inverse(
    name: str, module: nn.Module, factors: Factors, state: State, how: Shot
) -> tuple[Tensor, Tensor]:
    """A reader's weight, with its bias where it has or gets one, and the inverse of its input
    factor over the channels that are still there.
    """
    weight = affine_weight(module, how.bias or module.bias is not None)
    A = factors.inputs(weight.shape[1] > weight_of(module).shape[1]).to(weight.device)
    alive = state.alive.get(name)
    if alive is not None:
        there = torch.ones(len(A), device=A.device)
        there[: len(alive)] = alive.to(there)
        A = A * there * there[:, None]
    return weight, damped_inverse(A, how.ridge)


@torch.no_grad()
def unit_costs(
    model: nn.Module, group: Group, factors: dict[str, Factors], state: State, how: Shot
) -> Tensor:
    """(U,) float32 on the CPU: nats a token that each unit costs if the rest of its readers makes
    up for it.
    """
    total = torch.zeros(group.units, dtype=torch.float64)
    for r in readers(model, group):
        weight, inverse = reader_inverse(r.name, r.module, factors[r.name], state, how)
        outer = factors[r.name].outputs().to(weight.device)
        total += column_costs(weight, inverse, outer, r.member.index).cpu()
    for name, rows in writers(model, group) if how.cost == "group" else ():
        module = model.get_submodule(name)
        weight = affine_weight(module, module.bias is not None)
        A = factors[name].inputs(module.bias is not None).to(weight.device)
        inverse = damped_inverse(factors[name].outputs().to(weight.device), how.ridge)
        total += column_costs(weight.T, inverse, A, rows).cpu()
    return total.float()


@torch.no_grad()
def refit(
    model: nn.Module,
    group: Group,
    going: Tensor,
    factors: dict[str, Factors],
    state: State,
    how: Shot,
) -> None:
    """Take the units `going` (U,) bool from their readers, in place, and let the rest make up for
    them.
    """
    for r in readers(model, group):
        weight, inverse = reader_inverse(r.name, r.module, factors[r.name], state, how)
        gone = r.member.index[going].flatten()
        after = without_columns(weight, inverse, gone)
        inputs = r.weight.shape[1]
        r.weight.copy_(after[:, :inputs].to(r.weight))
        if len(after[0]) > inputs:
            add_biases(model, {r.name: (after - weight)[:, inputs]})
        alive = state.alive.setdefault(r.name, torch.ones(inputs, dtype=torch.bool))
        alive[gone.cpu()] = False
