"""What learned masks whose units compete begin and end with: shared by Compresso and NutePrune."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from prunekit import graph
from prunekit.architecture.blocks import linear_names
from prunekit.architecture.sizes import Sizes
from prunekit.errors import ConfigError
from prunekit.graph.fold_gates import check_channels
from prunekit.problem import CALIBRATION, Expected, Problem, expect
from prunekit.selection.units import check_finite, choose
from prunekit.training.constraints import ConstraintKind, SizeConstraint, warn_of_missed
from prunekit.training.learned_masks import LearnedMasks
from prunekit.training.recipe import micro_batches
from prunekit.types import Allocation, Group, Kept

log = logging.getLogger("prunekit")
SCORED = 64
"""Samples that a criterion reads."""
Kinds = Annotated[list[Literal["heads", "neurons", "hidden"]], Field(min_length=1)]


def check_competing(
    problem: Problem,
    kinds: list[str],
    targets: list[str] | None,
    batch: int,
    micro_batch: int,
    remove: bool,
    constraint: ConstraintKind,
) -> Expected:
    """Raises ConfigError where the ratio cannot be met, where gates cannot be folded, for batches
    that cannot be, and for a criterion that has nothing to say.
    """
    check_start(problem, constraint)
    micro_batches(batch, micro_batch)
    linear_names(problem.model, targets)
    expected = expect(problem, problem.groups(kinds), smaller=remove)
    check_channels(problem.model, expected.groups)
    return expected


def check_start(problem: Problem, constraint: ConstraintKind) -> None:
    """Raises ConfigError for a criterion that could not say how masks begin."""
    if problem.criterion is not None and constraint != "exact":
        raise ConfigError(
            f"pruner.constraint={constraint} begins with all units open, which leaves a criterion "
            "nothing to say: give criterion=none, or pruner.constraint=exact"
        )


def new_masks(
    problem: Problem, groups: list[Group], seed: int, constraint: ConstraintKind
) -> LearnedMasks:
    """Masks over the groups; where there is a criterion in its order on the first samples."""
    order = None
    if problem.criterion is not None:
        # The text is as long as the training; an order to begin with needs little of it.
        few = replace(problem, token_sets={CALIBRATION: problem.tokens[:SCORED]})
        order = few.score(groups, few.run())
        check_finite(order)
    bounded = constraint == "lagrangian"
    return LearnedMasks(problem.model, groups, seed, order=order, bounded=bounded)


def size_constraint(
    problem: Problem,
    groups: list[Group],
    allocation: Allocation,
    seed: int,
    warmup: int,
    kind: ConstraintKind,
) -> SizeConstraint:
    """New masks over the groups, which are to take what the allocation does; the target grows from
    nothing over `warmup` steps. Warns of an allocation that is not how the masks compete.
    """
    if allocation.ranking != "global" or allocation.budget == "units":
        log.warning(
            "the masks learn how many parameters go, from wherever it hurts least, and this ratio "
            "counts otherwise: what goes is not what they learn; ratio=global with "
            "ratio.of=prunable or model lets them choose"
        )
    sizes = Sizes(problem.model, groups)
    masks = new_masks(problem, groups, seed, kind)
    return SizeConstraint(masks, sizes.removed(allocation.counts), sizes.prunable(), warmup, kind)


def apply_masks(masks: LearnedMasks, allocation: Allocation, remove: bool) -> Kept:
    """Removes, or zeroes, the units of lowest log alpha that an allocation takes, with the gates of
    the others folded into the weights. Returns what stays.
    """
    model = masks.model
    kept = choose(model, masks.groups, masks.log_alphas(), allocation)
    masks.hold(kept)
    masks.fold()
    if remove:
        graph.remove(model, kept, norm="rescale")
    else:
        graph.zero(model, kept)
    return kept


def notes_of(
    allocation: Allocation, constraint: SizeConstraint, curve: list[dict[str, Any]]
) -> dict[str, Any]:
    """The notes that both have; warns where the masks expected something else than went."""
    sparsity = float(constraint.sparsity().detach())
    warn_of_missed("prunable parameters", sparsity - constraint.target, constraint.target)
    return {
        "counts": allocation.counts,
        "curve": curve,
        "sparsity": sparsity,
        "target": constraint.target,
    }
