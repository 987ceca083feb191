"""What pruners of single weights share that see one matrix and the gram matrix of its inputs at a
time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from prunekit.activations.blockwise import BlockRun
from prunekit.activations.done_blocks import Outcome, packed, unpacked
from prunekit.activations.gram import grams, warn_of_little_text
from prunekit.activations.storage import PassOptions
from prunekit.architecture.mapped import beside
from prunekit.architecture.matrices import elements_gone, matrix, module_name, to_out_in
from prunekit.errors import ConfigError
from prunekit.problem import Expected, Problem, expect, ranking_of
from prunekit.selection.elements import SCOPES, Pattern, Scope, check_pattern
from prunekit.solvers.admm import Select, lowest_outside_runs
from prunekit.solvers.preconditioning import squared_error
from prunekit.types import Counts, Group, Kept, Pruned

Ridge = Annotated[float, Field(ge=0)]
Solve = Callable[..., tuple[Tensor, Tensor]]
"""`solve(weight, gram, select, count, name=...)`: new weights and the mask of what stays, both
`(outputs, inputs)`.
"""


def check_matrices(
    problem: Problem, pattern: Pattern | None, targets: list[str] | None, pruner: str
) -> Expected:
    """Raises ConfigError where the ratio cannot be met, or a pattern fits no matrix or ratio."""
    expected = expect(problem, problem.matrices(targets), smaller=False)
    check_local(ranking_of(problem, expected), pruner)
    check_pattern(problem.model, expected.groups, expected.counts, pattern)
    return expected


def check_not_rows(ranking: str, pruner: str) -> None:
    """Raises ConfigError for a ratio that gives each row a number of its own."""
    if ranking == "rows":
        raise ConfigError(
            f"pruner={pruner} takes a number of elements from each matrix, and the ratio gives "
            "each row one of its own: give ratio.per=matrix, or pruner=unstructured"
        )


def check_local(ranking: str, pruner: str) -> None:
    """Raises ConfigError for a ratio that ranks matrices, or their rows, in another way."""
    check_not_rows(ranking, pruner)
    if ranking != "local":
        raise ConfigError(
            f"ratio.ranking={ranking}: pruner={pruner} sees one matrix at a time and cannot rank "
            "them together; give ratio.ranking=local"
        )


def local_counts(
    problem: Problem, groups: list[Group], pattern: Pattern | None, pruner: str
) -> Counts:
    """How many elements of each matrix go. Raises ConfigError for a ratio that ranks matrices
    together, and where a pattern does not fit.
    """
    allocation = problem.allocate(groups)
    check_local(allocation.ranking, pruner)
    check_pattern(problem.model, groups, allocation.counts, pattern)
    return allocation.counts


def selection(g: Group, count: int, scope: Scope, pattern: Pattern | None) -> Select:
    """The rule by which elements of a matrix go."""
    if pattern:
        return lowest_outside_runs(pattern.kept_of(count, g.units, g.name), pattern.m)
    return SCOPES[scope]


def write(model: nn.Module, g: Group, new: Tensor, mask: Tensor) -> Tensor:
    """Put `new (outputs, inputs)` in the place of a matrix. Returns the mask, stored like it, in
    host memory: those of all matrices come to a byte a weight.
    """
    W = matrix(model, g)
    W.copy_(new.to(W).masked_fill_(~mask, 0))
    return beside(to_out_in(model, g, mask).contiguous().cpu(), W)


def masks_of(model: nn.Module, groups: list[Group], outcome: Outcome) -> Kept:
    """The masks of a block's outcome, in files where the matrices are."""
    masks = unpacked(outcome, "kept")
    return {g.name: beside(masks[g.name], matrix(model, g)) for g in groups}


def numbers_of(outcome: Outcome, part: str) -> dict[str, float]:
    """Numbers of a block's outcome, by matrix."""
    return {name: float(number) for name, number in unpacked(outcome, part).items()}


def warn_by_matrix(problem: Problem, groups: list[Group]) -> None:
    """Warns of matrices that have more inputs than there are calibration tokens."""
    inputs = {module_name(g): matrix(problem.model, g).shape[1] for g in groups}
    warn_of_little_text(problem.tokens, inputs)


@torch.no_grad()
def prune_matrices(
    problem: Problem,
    solve: Solve,
    *,
    pruner: str,
    scope: Scope,
    pattern: Pattern | None,
    targets: list[str] | None,
    options: PassOptions,
) -> Pruned:
    """Every matrix by `solve`, block by block. The notes' `costs` are the squared errors of the
    outputs, a token. Raises ConfigError as `local_counts` does.
    """
    model, groups = problem.model, problem.matrices(targets)
    counts = local_counts(problem, groups, pattern, pruner)
    warn_by_matrix(problem, groups)

    def solved(part: list[Group], run: BlockRun) -> Outcome:
        masks: Kept = {}
        errors: dict[str, float] = {}
        for alike, gram in grams(model, part, run):
            for g in alike:
                W, count = matrix(model, g).float(), counts[g.name]
                if pattern:
                    count = pattern.gone_of(count, g.units, g.name)
                here = gram.to(W.device)
                new, mask = solve(W, here, selection(g, count, scope, pattern), count, name=g.name)
                errors[g.name] = squared_error(W, new, here)
                masks[g.name] = write(model, g, new, mask)
        return packed(kept=masks, costs=errors)

    kept: Kept = {}
    costs: dict[str, float] = {}
    for row, run in problem.by_block(groups, counts, options, resumable=True):
        part = [g for g in row if counts[g.name]]
        found = run.once(partial(solved, part, run), [g.matrix for g in part])
        kept |= masks_of(model, part, found)
        costs |= numbers_of(found, "costs")
    return Pruned(model, kept, groups, {}, {"counts": elements_gone(kept), "costs": costs})
