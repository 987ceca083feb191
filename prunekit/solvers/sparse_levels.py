"""A database of matrices, each solved by SparseGPT at a few sparsities (the database of EvoPress,
arXiv 2410.14649): one gram matrix and one factor of its inverse serve all levels of all matrices
that read the same input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunekit.activations.blockwise import BlockRun, groups_by_block
from prunekit.activations.dense_stream import DenseStream
from prunekit.activations.gram import grams
from prunekit.architecture.mapped import release
from prunekit.architecture.matrices import matrix
from prunekit.architecture.streaming import turn
from prunekit.checkpoint.bitmask import bits_of, filled, mask_of
from prunekit.selection.elements import floor_share
from prunekit.solvers.level_database import LevelDatabase
from prunekit.solvers.preconditioning import squared_error
from prunekit.solvers.sparsegpt import inverse_factor, lowest_of_block, solve_columns
from prunekit.types import Group

Solution = dict[str, Tensor]
"""One matrix on disk: `removed`, `errors`, `ridge` (what its factor took), and for each level at
which K of its elements are gone `mask.K`, one bit an element of `(outputs, inputs)`, and
`values.K`, the others in a row."""


@dataclass
class SharedInput:
    """What several matrices read: the mean of `x x^T` and, once asked for, the factor `U` of its
    inverse in float64 and the ridge that it took.
    """

    gram: Tensor
    ridge: float
    name: str

    @cached_property
    def factor(self) -> tuple[Tensor, float]:
        return inverse_factor(self.gram, self.ridge, self.name)


@dataclass(kw_only=True)
class SparseLevels(LevelDatabase):
    """The matrices in `wanted` at shares `levels` of their elements gone, the first 0.

    Attributes:
        block: inputs among whose elements those with the least saliency go.
        ridge: in units of the gram's mean diagonal.
        inputs: of the block at work, by matrix.
    """

    wanted: Sequence[Group]
    levels: Sequence[float]
    block: int
    ridge: float
    inputs: dict[str, SharedInput] = field(default_factory=dict)

    @property
    def key(self) -> list[Any]:
        return [*self.levels, self.block, self.ridge, *self.options]

    @cached_property
    def places(self) -> list[tuple[int, Group]]:
        rows = groups_by_block(list(self.wanted), self.blocks)
        return [(b, g) for b, row in enumerate(rows) for g in row]

    def counts(self, group: Group) -> list[int]:
        """Elements that are gone at each level."""
        return sorted({floor_share(group.units, share) for share in self.levels})

    def most(self, group: Group) -> int:
        return self.counts(group)[-1]

    def cost(self, group: Group, removed: int) -> float:
        found = self.solved[group.name]
        return float(np.interp(removed, found["removed"].numpy(), found["errors"].numpy()))

    def solution(self, dense: DenseStream, block: int, group: Group) -> Solution:
        run = dense.run(block)
        with turn(run.module):
            weight, shared = matrix(self.model, group), self._input(run, group)
            return solve_sparsities(weight, shared, self.counts(group), self.block)

    def _input(self, run: BlockRun, group: Group) -> SharedInput:
        """Of a matrix in the block of `run`, all of whose inputs are seen in one pass."""
        if group.name not in self.inputs:
            row = [g for b, g in self.places if b == run.block]
            self.inputs = {}  # those of the block before are not needed any more
            for alike, gram in grams(self.model, row, run):
                shared = SharedInput(gram, self.ridge, alike[0].name)
                self.inputs |= {g.name: shared for g in alike}
        return self.inputs[group.name]

    def level(self, group: Group, removed: int) -> tuple[Tensor, Tensor]:
        """The weights of a level that is not dense, and the mask of what stays, `(outputs,
        inputs)`.
        """
        found, weight = self.solved[group.name], matrix(self.model, group)
        bits, values = found[f"mask.{removed}"], found[f"values.{removed}"]
        mask = mask_of(bits, group.units).view(weight.shape)
        new = filled(mask, values)
        release([bits, values])
        return new.to(weight.device), mask.to(weight.device)

    def write(self, group: Group, removed: int) -> None:
        if removed:
            matrix(self.model, group).copy_(self.level(group, removed)[0])

    def weight(self, group: Group) -> Tensor:
        return matrix(self.model, group)

    def grown(self) -> dict[str, float]:
        """By matrix, the ridge where it had to grow."""
        found = {name: float(s["ridge"]) for name, s in self.solved.items()}
        return {name: ridge for name, ridge in found.items() if ridge != self.ridge}

    def bytes(self) -> int:
        """Of all levels on disk, from shapes alone."""
        total = 0
        for g in self.wanted:
            size = matrix(self.model, g).element_size()
            for count in self.counts(g)[1:]:
                total += (g.units - count) * size + -(-g.units // 8)
        return total


def solve_sparsities(
    weight: Tensor, shared: SharedInput, counts: list[int], block: int
) -> Solution:
    """A matrix `(outputs, inputs)` with so many of its elements gone, each time from the dense one;
    the first count is 0. Errors are those of the output, a token, relative to the dense output.
    """
    W, gram = weight.float(), shared.gram.to(weight.device)
    factor, ridge = shared.factor
    upper, dead = factor.to(W), gram.diagonal() == 0
    size = squared_error(W, torch.zeros_like(W), gram)
    found: Solution = {"removed": torch.tensor(counts), "ridge": torch.tensor(ridge).double()}
    errors = [0.0]
    for count in counts[1:]:
        rule = lowest_of_block(count, W.shape[1], block)
        new, mask, _ = solve_columns(W, upper, rule, block, dead)
        new = new.to(weight)
        found |= {
            f"mask.{count}": bits_of(mask.flatten().cpu()),
            f"values.{count}": new[mask].cpu(),
        }
        errors.append(squared_error(W, new, gram) / size if size else 0.0)
    return found | {"errors": torch.tensor(errors, dtype=torch.float64)}
