"""ADMM pruning (Boža, TMLR 2024, arXiv 2401.02938): single weights, unstructured or N:M, those that
stay solving the least squares of the matrix's output.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from prunekit.activations.storage import PassOptions, Precision, Store
from prunekit.errors import ConfigError
from prunekit.problem import Expected, Problem
from prunekit.pruners.matrixwise import Ridge, check_matrices, prune_matrices
from prunekit.registry import Natural, Positive, pruners
from prunekit.selection.elements import NM, Pattern, Scope
from prunekit.solvers import admm as solver
from prunekit.types import Pruned


def check_admm(
    problem: Problem,
    *,
    pattern: Pattern | None,
    iterations: int,
    reselect: int,
    targets: list[str] | None,
    **_: Any,
) -> Expected:
    """Raises ConfigError where the ratio cannot be met, a pattern fits no matrix or ratio, or the
    mask would not be finished.
    """
    if reselect > iterations:
        raise ConfigError(
            f"pruner.reselect={reselect} must not exceed pruner.iterations={iterations}: the mask "
            "reaches its size at the last of the iterations that choose it anew"
        )
    return check_matrices(problem, pattern, targets, "admm")


@pruners.register(paper="arXiv 2401.02938", year=2024, needs="data", out="zeros", check=check_admm)
def admm(
    problem: Problem,
    *,
    scope: Scope = "matrix",
    pattern: NM = None,
    iterations: Positive = 20,
    reselect: Natural = 15,
    ridge: Ridge = 0.1,
    targets: list[str] | None = None,
    store: Store = "memory",
    precision: Precision = "model",
) -> Pruned:
    """Zeroes elements of the linear matrices by ADMM, which chooses them and moves the others.

    Args:
        scope: `row` takes the same number from every output (rounded down), `matrix` so many of
            each matrix, `alpha` from every row the lowest ones up to the same share of its sum.
        pattern: "2:4" keeps 2 of every 4 consecutive inputs; the ratio must agree. "N:8" lets the
            ratio decide for each matrix. The scope has no say then.
        iterations: of ADMM.
        reselect: of them, those that choose the mask anew while it grows to its size; 0 keeps
            Wanda's mask (the paper's ADMM1).
        ridge: of each input, in units of its own mean square.
        targets: names or globs of the linear modules in a block; null takes all.
        store: where activations between blocks wait.
        precision: of the forwards.

    Raises ConfigError where a pattern fits no matrix or ratio, or the numbers are not finite.
    """
    return prune_matrices(
        problem,
        partial(solver.admm, iterations=iterations, reselect=reselect, ridge=ridge),
        pruner="admm",
        scope=scope,
        pattern=pattern,
        targets=targets,
        options=PassOptions(store, precision),
    )
