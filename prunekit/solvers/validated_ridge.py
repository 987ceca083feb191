"""Ridges chosen by text that the map was not fitted to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from prunekit.activations.gram import GramStatistics, added
from prunekit.solvers.least_squares import ridge_problem

FOLDS = 2
"""Parts of the text, each of which judges what is fitted to the others."""
FACTOR = 4.0
"""Between one ridge that is tried and the next."""
STEPS = 4
"""Tries in one direction at most."""


@dataclass(frozen=True)
class Ridges:
    """Tokens that the two ridges of `ridge_problem` weigh as much as."""

    ridge: float
    dense_ridge: float


def validated(
    folds: Sequence[GramStatistics],
    weight: Tensor,
    kept: Tensor,
    affine: bool,
    start: Ridges,
    choose: Sequence[str],
) -> Ridges:
    """The ridges with which a map from the inputs `kept` (indices), fitted to all `folds` but one,
    has the least error on that one, over all of them in turn.

    Since ridges are numbers of tokens, what is best for a part of the text serves the whole. Each
    of those named in `choose` (fields of `Ridges`) walks from `start` by factors of four while the
    error falls.
    """
    rest = [added([*folds[:i], *folds[i + 1 :]]) for i in range(len(folds))]

    def error(ridges: Ridges) -> float:
        return sum(
            held_out_error(fit, fold, weight, kept, affine, ridges)
            for fit, fold in zip(rest, folds, strict=True)
        )

    best = start
    for name in choose:
        best = _walk(error, best, name)
    return best


def refitted(
    folds: Sequence[GramStatistics],
    weight: Tensor,
    kept: Tensor,
    affine: bool,
    ridges: Ridges,
    choose: Sequence[str],
) -> tuple[Tensor, Tensor | None, Ridges]:
    """The best map from the inputs `kept`, fitted to all `folds`: its weights, its bias, and the
    ridges, of which those in `choose` are chosen as `validated` does.
    """
    if choose:
        ridges = validated(folds, weight, kept, affine, ridges, choose)
    task = ridge_problem(added(folds), weight, ridges.ridge, affine, ridges.dense_ridge)
    return *task.solve(kept), ridges


def held_out_error(
    fit: GramStatistics,
    test: GramStatistics,
    weight: Tensor,
    kept: Tensor,
    affine: bool,
    ridges: Ridges,
) -> float:
    """The squared error on the tokens of `test` of the map that is fitted to `fit`, up to what no
    map changes (the square of the `y` of `test`).
    """
    task = ridge_problem(fit, weight, ridges.ridge, affine, ridges.dense_ridge)
    A, b = task.solve(kept)
    missing = weight.double().clone()
    missing[:, kept] -= A
    error = ((missing @ test.gram.double()) * missing).sum()
    off = missing @ test.sum_x.double()
    if test.cross.shape[1]:
        error = error + 2 * (missing * test.cross.double().T).sum()
        off = off + test.sum_y.double()
    if b is not None:
        error = error - 2 * b @ off + test.total * b @ b
    return float(error)


def _walk(error: Callable[[Ridges], float], start: Ridges, name: str) -> Ridges:
    """From `start` towards larger values, else towards smaller ones, while the error falls."""
    lowest, best = error(start), start
    for factor in (FACTOR, 1 / FACTOR):
        for _ in range(STEPS):
            tried = replace(best, **{name: getattr(best, name) * factor})
            found = error(tried)
            if not found < lowest:
                break
            lowest, best = found, tried
        if best is not start:
            break
    return best
