"""What SparseGPT and the pruners that begin with it share: one matrix, solved column by column."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prunekit.architecture.matrices import matrix
from prunekit.errors import ConfigError
from prunekit.problem import Expected, Problem
from prunekit.pruners.matrixwise import check_matrices, write
from prunekit.selection.elements import Pattern
from prunekit.solvers.sparsegpt import MaskRule, lowest_of_block, of_each_run, solve_columns
from prunekit.types import Group


def check_columns(
    problem: Problem, pattern: Pattern | None, block: int, targets: list[str] | None, pruner: str
) -> Expected:
    """Raises ConfigError where the ratio cannot be met, or a pattern fits no matrix or block."""
    check_block(pattern, block)
    return check_matrices(problem, pattern, targets, pruner)


def check_block(pattern: Pattern | None, block: int) -> None:
    """Raises ConfigError for a block of inputs that ends inside of a run of the pattern."""
    if pattern and block % pattern.m:
        raise ConfigError(f"pruner.block={block} must be a multiple of the {pattern.m} of pattern")


def mask_rule(g: Group, inputs: int, count: int, pattern: Pattern | None, block: int) -> MaskRule:
    """How `count` elements of a matrix are chosen."""
    if pattern:
        return of_each_run(pattern.kept_of(count, g.units, g.name), pattern.m)
    return lowest_of_block(count, inputs, block)


def prune_matrix(
    model: nn.Module,
    g: Group,
    gram: Tensor,
    U: Tensor,
    count: int,
    pattern: Pattern | None,
    block: int,
) -> tuple[Tensor, float]:
    """Solve one matrix in place. Returns the mask, stored like the matrix, and the cost."""
    W = matrix(model, g)
    rule = mask_rule(g, W.shape[1], count, pattern, block)
    dead = gram.diagonal().to(W.device) == 0
    new, mask, cost = solve_columns(W.float(), U.to(W.device, torch.float32), rule, block, dead)
    return write(model, g, new, mask), cost
