"""LASER (Sharma et al., ICLR 2024, arXiv 2312.13558): chosen matrices without their small singular
components; which ones, and at what rank, a text decides.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from tqdm import tqdm

from prunekit.activations.blockwise import groups_by_block
from prunekit.activations.runs import forward
from prunekit.architecture.matrices import matrix, module_name, shared_parameters
from prunekit.checkpoint.remote_code.runtime_modules import LowRank, insert
from prunekit.errors import ConfigError
from prunekit.problem import Expected, Problem
from prunekit.registry import Natural, Positive, pruners
from prunekit.scoring.block_trials import BlockTrials, Metric, TrialOptions, text_cost
from prunekit.solvers.low_rank import Factors, rank_of, smaller_as_factors, spectrum
from prunekit.types import Group, Pruned

log = logging.getLogger("prunekit")
Search = Literal["greedy", "best", "none"]
RankShare = Annotated[float, Field(gt=0, le=1)]
SHARES = (0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
AGREES = 0.1
"""Relative change of the logits. Rounding of bfloat16 moves them by 0.01."""


class Reduction(NamedTuple):
    """A matrix, the share of its rank that stays, and what is left of it."""

    group: Group
    share: float
    factors: Factors


def check_laser(
    problem: Problem,
    *,
    search: Search,
    targets: list[str] | None,
    layers: list[int] | None,
    shares: Sequence[float],
    **_: Any,
) -> Expected:
    """Raises ConfigError for a matrix or a layer that the model lacks, for a matrix that several
    modules share, and for several shares where none is searched for.
    """
    remark = "A text decides which matrices lose rank, and how much."
    return Expected(candidates(problem, search, targets, layers, shares), None, remark=remark)


def candidates(
    problem: Problem,
    search: Search,
    targets: list[str] | None,
    layers: list[int] | None,
    shares: Sequence[float],
) -> list[Group]:
    """The matrices that may lose rank. Raises ConfigError as `check_laser` does."""
    if not shares:
        raise ConfigError("pruner.shares=[]: there must be one")
    if search == "none" and len(shares) > 1:
        raise ConfigError(f"pruner.shares={list(shares)}: pruner.search=none takes one share")
    depth = len(problem.blocks())
    beyond = [n for n in layers or () if n >= depth]
    if beyond or layers == []:
        raise ConfigError(f"pruner.layers={layers}: the model has the blocks 0 to {depth - 1}")
    groups = [g for g in problem.matrices(targets) if layers is None or g.layer in layers]
    if not groups:
        raise ConfigError(
            f"no matrix of pruner.targets={targets} is in pruner.layers={layers}, or the exclusion "
            "spares them all"
        )
    shared = shared_parameters(problem.model)
    for g in groups:
        if id(problem.model.get_parameter(g.matrix)) in shared:
            raise ConfigError(
                f"{module_name(g)} shares its matrix with another module: narrow pruner.targets"
            )
    return groups


@pruners.register(
    paper="arXiv 2312.13558",
    year=2024,
    needs="data",
    out="self-contained",
    own_ratio=True,
    searches=True,
    check=check_laser,
)
@torch.no_grad()
def laser(
    problem: Problem,
    *,
    search: Search = "greedy",
    targets: list[str] | None = None,
    layers: list[Natural] | None = None,
    shares: Sequence[RankShare] = SHARES,
    metric: Metric = "loss",
    factors: bool = True,
    batch: Positive = 8,
    reuse: bool = True,
) -> Pruned:
    """Lowers the rank of those matrices whose small singular components the calibration text can do
    without.

    Args:
        search: `best` takes the one matrix and share that serve the text best, if that is better
            than the dense model; `greedy` goes from the last block to the first and takes of each
            matrix the lowest share that is better than what stands; `none` takes all matrices.
        targets: names or globs of the linear modules in a block; null takes all.
        layers: numbers of the blocks; null takes all.
        shares: of a matrix's rank, min(outputs, inputs), that may stay; 1 leaves it as it is.
        metric: of the calibration text: the `loss` of the next token, or how often it ranks first.
            An eval that reads the same text is refused.
        factors: store a matrix as two factors where they hold fewer numbers; false keeps every
            matrix dense, for stock transformers.
        batch: samples a forward of the search.
        reuse: start each trial from what enters the matrix's block, held for the whole text; false
            for a model whose blocks hand each other more than that.

    The notes have every cost that was tried. Raises ConfigError for a matrix or a layer that the
    model lacks.
    """
    groups = candidates(problem, search, targets, layers, shares)
    model, tokens = problem.model, problem.tokens
    notes: dict[str, Any] = {}
    if search == "none":
        found = [r for g in groups for r in reductions(model, g, shares)]
    else:
        how = TrialOptions(metric, batch, reuse)
        found, notes = searched(problem, groups, shares, search == "greedy", how)
        if not found:
            log.warning("no reduction serves the text better than the dense matrices: none is made")
    before = sum(p.numel() for p in model.parameters())
    notes["reduced"] = put_in(model, found, tokens[:1], factors)
    notes["parameters_removed"] = before - sum(p.numel() for p in model.parameters())
    return Pruned(model, {}, [], notes={"laser": notes})


def reductions(model: nn.Module, g: Group, shares: Sequence[float]) -> Iterator[Reduction]:
    """What is left of a matrix at each share that takes something of its rank, from the lowest on;
    shares of the same rank count once.
    """
    W = matrix(model, g)
    parts = spectrum(W)
    ranks = {rank_of(tuple(W.shape), share): share for share in sorted(shares, reverse=True)}
    for rank in sorted(ranks):
        if rank < min(W.shape):
            yield Reduction(g, ranks[rank], parts.truncated(rank))


def searched(
    problem: Problem,
    groups: list[Group],
    shares: Sequence[float],
    greedy: bool,
    options: TrialOptions,
) -> tuple[list[Reduction], dict[str, Any]]:
    """What is taken, and what was seen on the way."""
    model, tokens, blocks = problem.model, problem.tokens, problem.blocks()
    dense = standing = text_cost(model, tokens, options)
    taken: list[Reduction] = []
    costs: dict[str, dict[str, float]] = {}
    rows = zip(blocks, groups_by_block(groups, blocks), strict=True)
    with tqdm(total=len(groups), desc="matrices of another rank", unit="matrix", delay=2) as bar:
        for block, row in reversed([(block, row) for block, row in rows if row]):
            trials = BlockTrials(model, block, tokens, options)
            for g in row:
                costs[g.name], better = attempt(model, g, shares, greedy, trials, standing)
                standing = min([standing, *costs[g.name].values()])
                if better:
                    taken = [*taken, better] if greedy else [better]
                bar.update()
    seen = {"metric": options.metric, "dense": dense, "reduced_to": standing, "costs": costs}
    return taken, seen


def attempt(
    model: nn.Module,
    g: Group,
    shares: Sequence[float],
    greedy: bool,
    trials: BlockTrials,
    standing: float,
) -> tuple[dict[str, float], Reduction | None]:
    """The costs of one matrix's reductions by share, and the best one if it costs less than
    `standing`. If greedy the first that does, which stays in the model.
    """
    W = matrix(model, g)
    dense, better = W.clone(), None
    costs: dict[str, float] = {}
    for reduction in reductions(model, g, shares):
        W.copy_(reduction.factors.dense())
        cost = costs[f"{reduction.share:g}"] = trials.cost()
        if cost < standing:
            better, standing = reduction, cost
            if greedy:
                return costs, better
    W.copy_(dense)
    return costs, better


def put_in(
    model: nn.Module, found: list[Reduction], ids: Tensor, factors: bool
) -> list[dict[str, Any]]:
    """Put the reduced matrices into the model. Returns the notes of each. Raises ConfigError where
    the model cannot do with factors, judged by its logits for `ids (n, T)`.
    """
    notes = []
    for r in found:
        matrix(model, r.group).copy_(r.factors.dense())
    want = forward(model, ids).logits.float()
    for r in found:
        W, rank = matrix(model, r.group), r.factors.left.shape[1]
        small = factors and smaller_as_factors(tuple(W.shape), rank)
        if small:
            name = module_name(r.group)
            bias: Any = model.get_submodule(name).bias
            pair = LowRank.of(r.factors.left.to(W), r.factors.right.to(W), bias)
            insert(model, name, pair.requires_grad_(W.requires_grad))
        notes.append({"matrix": r.group.name, "share": r.share, "rank": rank, "as_factors": small})
    far = float((forward(model, ids).logits.float() - want).norm() / want.norm())
    if not far < AGREES:
        raise ConfigError(
            f"{type(model).__name__} does not compute with factors what it does with their "
            f"products ({far:.2g} apart): give pruner.factors=false"
        )
    return notes
