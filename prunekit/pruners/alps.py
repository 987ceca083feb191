"""ALPS (Meng et al., NeurIPS 2024, arXiv 2406.07831): single weights, unstructured or N:M, chosen
by ADMM until the choice rests; those that stay solve the least squares of the matrix's output.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from prunekit.activations.storage import PassOptions, Precision, Store
from prunekit.problem import Expected, Problem
from prunekit.pruners.matrixwise import Ridge, check_matrices, prune_matrices
from prunekit.registry import Above, Natural, Positive, pruners
from prunekit.selection.elements import NM, Pattern, Scope
from prunekit.solvers import alps as solver
from prunekit.types import Pruned


def check_alps(
    problem: Problem, *, pattern: Pattern | None, targets: list[str] | None, **_: Any
) -> Expected:
    """Raises ConfigError where the ratio cannot be met, or a pattern fits no matrix or ratio."""
    return check_matrices(problem, pattern, targets, "alps")


@pruners.register(paper="arXiv 2406.07831", year=2024, needs="data", out="zeros", check=check_alps)
def alps(
    problem: Problem,
    *,
    scope: Scope = "matrix",
    pattern: NM = None,
    iterations: Positive = 300,
    penalty: Above = 0.1,
    cg_steps: Natural = 10,
    ridge: Ridge = 0.01,
    targets: list[str] | None = None,
    store: Store = "memory",
    precision: Precision = "model",
) -> Pruned:
    """Zeroes elements of the linear matrices by ADMM with a growing penalty, and fits the others by
    conjugate gradients.

    Args:
        scope: `row` takes the same number from every output (rounded down), `matrix` so many of
            each matrix, `alpha` from every row the lowest ones up to the same share of its sum.
        pattern: "2:4" keeps 2 of every 4 consecutive inputs; the ratio must agree. "N:8" lets the
            ratio decide for each matrix. The scope has no say then.
        iterations: at most; it ends before, once the mask rests.
        penalty: at the start, in units of the scaled gram matrix's diagonal; it grows by 10 to 30 %
            every three iterations.
        cg_steps: conjugate gradient steps at the end.
        ridge: in units of the gram's mean diagonal.
        targets: names or globs of the linear modules in a block; null takes all.
        store: where activations between blocks wait.
        precision: of the forwards.

    Raises ConfigError where a pattern fits no matrix or ratio, or the numbers are not finite.
    """
    solve = partial(
        solver.alps, iterations=iterations, penalty=penalty, cg_steps=cg_steps, ridge=ridge
    )
    return prune_matrices(
        problem,
        solve,
        pruner="alps",
        scope=scope,
        pattern=pattern,
        targets=targets,
        options=PassOptions(store, precision),
    )
