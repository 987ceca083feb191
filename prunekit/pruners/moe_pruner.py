"""MoE-Pruner (Xie et al., 2024, arXiv 2410.12013): Wanda inside experts, where what a weight reads
counts times the router's weight.
"""

from __future__ import annotations

import logging
import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prunekit.activations.blockwise import BlockRun
from prunekit.activations.done_blocks import Outcome, packed, unpacked
from prunekit.activations.storage import PassOptions, Precision, Store
from prunekit.architecture.linear import weight_of
from prunekit.architecture.mapped import beside
from prunekit.architecture.matrices import matrices, module_name
from prunekit.errors import ConfigError
from prunekit.graph.expert_neurons import expert_slice, places
from prunekit.problem import Expected, Problem, expect, ranking_of
from prunekit.pruners.matrixwise import check_local
from prunekit.registry import pruners
from prunekit.scoring.expert_inputs import (
    ExpertInputs,
    FusedExperts,
    expert_inputs,
    fused_experts,
)
from prunekit.scoring.listed_experts import linear_squares
from prunekit.selection.elements import NM, Pattern, Scope, check_taken, element_mask
from prunekit.selection.eligible import apply_exclusion
from prunekit.selection.units import check_finite
from prunekit.types import Group, Kept, Member, Pruned, tensor_of

log = logging.getLogger("prunekit")


class Stack(NamedTuple):
    """A tensor that holds one matrix of every expert: its slices by expert and by neuron."""

    experts: FusedExperts
    slab: Member
    neurons: Member

    @property
    def inputs(self) -> int:
        """The axis along which a matrix reads."""
        return self.neurons.axis if self.neurons.reads else self.other

    @property
    def other(self) -> int:
        """The axis of the residual channels."""
        rank = 3 if self.slab.axis != self.neurons.axis else 2
        return next(i for i in range(rank) if i not in (self.slab.axis, self.neurons.axis))


class Single(NamedTuple):
    """The matrix of a linear module inside one of a list of experts."""

    module: str
    experts: Group


def expert_matrices(problem: Problem) -> tuple[list[Group], dict[str, Stack | Single]]:
    """The experts' matrices that are not excluded, as groups of single weights. Raises ConfigError
    where there are none.
    """
    model, everything = problem.model, problem.everything()
    found: dict[str, Stack | Single] = {}
    groups = []
    for f in fused_experts(model, everything):
        for slab, m in f.pairs:
            shape = tuple(tensor_of(model, slab.param).shape)
            if len(shape) < 2 or "bias" in slab.param.rpartition(".")[2]:
                continue
            name = f"weights.{f.group.layer}.{'.'.join(slab.param.split('.')[-2:])}"
            found[name] = Stack(f, slab, m)
            units = math.prod(shape)
            groups.append(
                Group(name, "weights", f.group.layer, units, shape=shape, matrix=slab.param)
            )
    lists = [g for g in everything if g.kind == "experts" and g.modules]
    if lists:
        for g in matrices(model):
            name = module_name(g)
            home = [e for e in lists if any(name.startswith(f"{path}.") for path in e.modules)]
            if home:
                found[g.name] = Single(name, home[0])
                groups.append(g)
    if not groups:
        raise ConfigError(
            f"{type(model).__name__} has no experts: take pruner=unstructured criterion=wanda, "
            "which prunes linear modules"
        )
    return apply_exclusion(groups, problem.exclude, everything), found


def check_moe_pruner(problem: Problem, *, pattern: Pattern | None, **_: Any) -> Expected:
    """Raises ConfigError where there are no experts, where the ratio cannot be met, lets matrices
    exchange elements or gives each row a number of its own, and where the pattern does not divide a
    matrix or is not what the ratio asks for.
    """
    groups, found = expert_matrices(problem)
    expected = expect(problem, groups, smaller=False)
    check_local(ranking_of(problem, expected), "moe_pruner")
    if pattern is None:
        return expected
    for g in groups:
        of = found[g.name]
        if isinstance(of, Stack):
            size = g.shape[of.inputs]
        else:
            size = weight_of(problem.model.get_submodule(of.module)).shape[1]
        if size % pattern.m:
            raise ConfigError(
                f"{g.name} has {size} inputs, which the {pattern.m} of pruner.pattern do not divide"
            )
    if expected.counts is not None:
        check_taken(groups, expected.counts, pattern)
    return expected


@pruners.register(
    paper="arXiv 2410.12013",
    year=2024,
    needs="data",
    out="zeros",
    kinds=("weights",),
    check=check_moe_pruner,
)
@torch.no_grad()
def moe_pruner(
    problem: Problem,
    *,
    scope: Scope = "row",
    pattern: NM = None,
    weighted: bool = True,
    store: Store = "memory",
    precision: Precision = "model",
) -> Pruned:
    """Zeroes the lowest weights of each expert by their size times the norm of what they read on
    the tokens routed to the expert, each times the router's weight; shapes stay.

    Args:
        scope: `row` takes the same number from every output of an expert, `matrix` so many of each
            matrix of an expert, `alpha` from every row the lowest up to the same share of its sum.
        pattern: "2:4" keeps 2 of every 4 consecutive inputs; the ratio must agree. "N:8" lets the
            ratio decide for each matrix.
        weighted: false leaves the router's weight out: Wanda, on experts.
        store: where activations between blocks wait.
        precision: of the forwards.

    Weights outside of experts stay. A block is scored on what the pruned ones before it put out. Of
    an expert that no token reached the smallest weights go. The paper's distillation is
    recovery=distill. Raises ConfigError for a model without experts, for a pattern that fits no
    matrix or ratio, and where what is read is not finite.
    """
    model = problem.model
    groups, found = expert_matrices(problem)
    allocation = problem.allocate(groups)
    check_local(allocation.ranking, "moe_pruner")
    counts = allocation.counts
    kept: Kept = {}

    def zeroed(row: list[Group], run: BlockRun) -> Outcome:
        mine = [found[g.name] for g in row]
        lone = {of.module: of.experts for of in mine if isinstance(of, Single)}
        squares = linear_squares(model, lone, run, weighted) if lone else {}
        check_finite(squares)
        masks: Kept = {}
        for g, of in zip(row, mine, strict=True):
            if isinstance(of, Stack):
                seen = expert_inputs(model, [of.experts], run, weighted)[of.experts.group.name]
                check_finite({g.name: torch.cat([seen.entering, seen.inside], 1)})
                mask = stack_mask(model, of, seen, counts[g.name], scope, pattern)
            else:
                mask = single_mask(model, of, squares[of.module], counts[g.name], scope, pattern)
            tensor_of(model, g.matrix).masked_fill_(~mask, 0)
            masks[g.name] = mask.cpu()
        return packed(kept=masks)

    options = PassOptions(store, precision)
    for row, run in problem.by_block(groups, counts, options, resumable=True):
        part = [g for g in row if counts[g.name]]
        outcome = run.once(partial(zeroed, part, run), [g.matrix for g in part])
        for g in part:
            mask = unpacked(outcome, "kept")[g.name]
            kept[g.name] = beside(mask, tensor_of(model, g.matrix))
    gone = {name: int((~mask).sum()) for name, mask in kept.items()}
    return Pruned(model, kept, groups, {}, {"counts": gone})


def stack_mask(
    model: nn.Module,
    stack: Stack,
    seen: ExpertInputs,
    count: int,
    scope: Scope,
    pattern: Pattern | None,
) -> Tensor:
    """What stays when `count` elements of a tensor go, as many from every expert."""
    experts, slab = stack.experts.experts, stack.slab
    mask = torch.ones_like(tensor_of(model, slab.param), dtype=torch.bool)
    outputs = stack.other if stack.neurons.reads else stack.neurons.axis
    for e, tokens in enumerate(seen.tokens.tolist()):
        part = expert_slice(model, slab, e).float().abs()
        norm = _norms(stack, seen, e, tokens, part)
        moved = part.movedim((outputs, stack.inputs), (-2, -1))
        scores = (moved * norm).reshape(moved.shape[-2:])
        own = element_mask(scores, count // experts, scope, pattern, slab.param)
        own = own.view(moved.shape).movedim((-2, -1), (outputs, stack.inputs))
        mask.index_copy_(slab.axis, slab.index[e].to(mask.device), own)
    return mask


def single_mask(
    model: nn.Module,
    single: Single,
    square: Tensor,
    count: int,
    scope: Scope,
    pattern: Pattern | None,
) -> Tensor:
    """What stays when `count` elements of one expert's matrix go, in the shape in which its module
    stores it; `square (inputs,)` is of what it reads.
    """
    module = model.get_submodule(single.module)
    norm = square.sqrt()
    if not square.any():
        log.warning("no token reached %s", single.module)
        norm = torch.ones_like(square)
    scores = weight_of(module).float().abs() * norm.to(weight_of(module).device)
    mask = element_mask(scores, count, scope, pattern, single.module)
    return mask if isinstance(module, nn.Linear) else mask.T


def _norms(stack: Stack, seen: ExpertInputs, expert: int, tokens: float, part: Tensor) -> Tensor:
    """(inputs,) of one expert, which so many tokens reached."""
    size = part.shape[stack.inputs]
    if not tokens:
        log.warning("no token reached expert %d of %s", expert, stack.experts.group.name)
        return part.new_ones(size)
    if not stack.neurons.reads:
        return seen.entering[expert].sqrt().to(part.device)
    at = places(stack.slab, stack.neurons, expert)[:, 0].to(part.device)
    return part.new_zeros(size).index_copy_(0, at, seen.inside[expert].sqrt().to(part.device))
