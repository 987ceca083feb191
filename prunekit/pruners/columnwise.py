"""What SparseGPT and the pruners that begin with it share: matrices solved column by column."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.activations.blockwise import BlockRun
from prunekit.activations.done_blocks import Outcome, packed
from prunekit.activations.gram import grams
from prunekit.activations.storage import PassOptions
from prunekit.architecture.matrices import elements_gone, matrix
from prunekit.errors import ConfigError
from prunekit.problem import Expected, Problem
from prunekit.pruners.matrixwise import check_matrices, masks_of, numbers_of, write
from prunekit.selection.elements import Pattern
from prunekit.solvers.sparsegpt import (
    MaskRule,
    highest_of_runs,
    inverse_factor,
    lowest_of_block,
    solve_columns,
)
from prunekit.types import Counts, Group, Kept


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


@dataclass
class Columns:
    """SparseGPT on the matrices of a model.

    Attributes:
        counts: elements to remove by matrix.
        block: inputs among whose elements those with the least `w^2 / U_jj^2` go.
        ridge: in units of the gram's mean diagonal.
        kept: masks so far, stored like the matrices; `costs` what they cost.
        grown: the ridge of matrices for which it had to grow.
    """

    model: nn.Module
    counts: Counts
    pattern: Pattern | None
    block: int
    ridge: float
    kept: Kept = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)
    grown: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_block(self.pattern, self.block)

    def rule(self, g: Group, inputs: int) -> MaskRule:
        """How the elements of a matrix are chosen."""
        count = self.counts[g.name]
        if self.pattern:
            return highest_of_runs(self.pattern.kept_of(count, g.units, g.name), self.pattern.m)
        return lowest_of_block(count, inputs, self.block)

    def solve(self, g: Group, W: Tensor, U: Tensor, dead: Tensor) -> tuple[Tensor, Tensor, float]:
        """New weights for `W (outputs, inputs)`, the mask of what stays, and the cost."""
        upper, dead = U.to(W.device, torch.float32), dead.to(W.device)
        return solve_columns(W.float(), upper, self.rule(g, W.shape[1]), self.block, dead)

    def prune(self, alike: list[Group], gram: Tensor) -> tuple[Tensor, Tensor]:
        """Solve matrices that read the same input, in place. Returns the factor `U` of the inverse
        of its gram matrix, and which inputs are always zero.
        """
        U, took = inverse_factor(gram, self.ridge, alike[0].name)
        dead = gram.diagonal() == 0
        for g in alike:
            new, mask, cost = self.solve(g, matrix(self.model, g), U, dead)
            self.kept[g.name] = write(self.model, g, new, mask)
            self.costs[g.name] = cost
            if took != self.ridge:
                self.grown[g.name] = took
        return U, dead

    def prune_block(self, alike: list[Group], run: BlockRun) -> None:
        """`prune` what is in one block."""

        def solve() -> Outcome:
            for same_input, gram in grams(self.model, alike, run):
                self.prune(same_input, gram)
            return self.outcome(alike)

        self.take(alike, run.once(solve, [g.matrix for g in alike]))

    def outcome(self, groups: list[Group]) -> Outcome:
        """What came of these matrices beside their weights."""
        names = {g.name for g in groups}
        kept, costs, grown = (
            {n: v for n, v in found.items() if n in names}
            for found in (self.kept, self.costs, self.grown)
        )
        return packed(kept=kept, costs=costs, grown=grown)

    def take(self, groups: list[Group], outcome: Outcome) -> None:
        """Take in what `outcome` gave, in this run or in one that was cut off."""
        self.kept |= masks_of(self.model, groups, outcome)
        self.costs |= numbers_of(outcome, "costs")
        self.grown |= numbers_of(outcome, "grown")

    def notes(self) -> dict[str, Any]:
        """Elements that went, costs and grown ridges by matrix."""
        gone = elements_gone(self.kept)
        return {"counts": gone, "costs": self.costs, "larger_ridge": self.grown}


def prune_columns(
    problem: Problem,
    groups: list[Group],
    counts: Counts,
    *,
    pattern: Pattern | None,
    block: int,
    ridge: float,
    options: PassOptions,
) -> Columns:
    """SparseGPT block by block: `counts` elements of each matrix go, on what the blocks before put
    out.
    """
    columns = Columns(problem.model, counts, pattern, block, ridge)
    for row, run in problem.by_block(groups, counts, options, resumable=True):
        columns.prune_block([g for g in row if counts[g.name]], run)
    return columns
