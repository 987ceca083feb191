"""SparseGPT (Frantar & Alistarh, ICML 2023, arXiv 2301.00774): single weights, unstructured or N:M,
the others of a row making up for them.
"""

from __future__ import annotations

from typing import Any

import torch

from prunekit.activations.storage import PassOptions, Precision, Store
from prunekit.problem import Expected, Problem
from prunekit.pruners.columnwise import check_columns, prune_columns
from prunekit.pruners.matrixwise import Ridge, local_counts, warn_by_matrix
from prunekit.registry import Positive, pruners
from prunekit.selection.elements import NM, Pattern
from prunekit.types import Pruned


def check_sparsegpt(
    problem: Problem,
    *,
    pattern: Pattern | None,
    block: int,
    targets: list[str] | None,
    **_: Any,
) -> Expected:
    """Raises ConfigError where the ratio cannot be met, or a pattern fits no matrix or block."""
    return check_columns(problem, pattern, block, targets, "sparsegpt")


@pruners.register(
    paper="arXiv 2301.00774", year=2023, needs="data", out="zeros", check=check_sparsegpt
)
@torch.no_grad()
def sparsegpt(
    problem: Problem,
    *,
    pattern: NM = None,
    block: Positive = 128,
    ridge: Ridge = 0.01,
    targets: list[str] | None = None,
    store: Store = "memory",
    precision: Precision = "model",
) -> Pruned:
    """Zeroes elements of the linear matrices by their exact cost on the calibration text, and
    corrects the rest of each row.

    Args:
        pattern: "2:4" keeps 2 of every 4 consecutive inputs; the ratio must agree. "N:8" lets the
            ratio decide for each matrix.
        block: inputs among whose elements those with the least `w^2 / U_jj^2` go.
        ridge: in units of the gram's mean diagonal; it grows, with a warning, where rounding
            leaves no Cholesky factor.
        targets: names or globs of the linear modules in a block; null takes all.
        store: where activations between blocks wait.
        precision: of the forwards.

    Raises ConfigError where a pattern fits no matrix or ratio.
    """
    groups = problem.matrices(targets)
    warn_by_matrix(problem, groups)
    counts = local_counts(problem, groups, pattern, "sparsegpt")
    columns = prune_columns(
        problem,
        groups,
        counts,
        pattern=pattern,
        block=block,
        ridge=ridge,
        options=PassOptions(store, precision),
    )
    return Pruned(problem.model, columns.kept, groups, {}, columns.notes())
