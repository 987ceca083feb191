"""What units are worth, from how a model does without some of them (Bonsai, Dery et al., 2024,
arXiv 2402.05406): pairs of complementary masks, and a linear regression of all units at once.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
FOLDS = 5
STRENGTHS = np.geomspace(1, 1e-4, 13)
"""Of the L1 penalty, as shares of the one at which all coefficients are zero."""


def draw_pair(
    prior: Tensor, candidates: Tensor, first: int, second: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Two sets of `first` and `second` units, apart, to do without: indices into `prior (U,)`.

    The first is drawn among `candidates` with probabilities that fall with the prior, the second
    from the rest of them, all alike. Raises ValueError where there are not so many.
    """
    if first + second > len(candidates):
        raise ValueError(f"{first} and {second} of {len(candidates)} candidates")
    picked = candidates.new_zeros(0)
    if first:
        chances = (prior.max() - prior[candidates]).double()
        chances += 1e-6 * chances.mean() + torch.finfo(chances.dtype).tiny  # the last one too
        picked = torch.multinomial(chances, first, generator=generator)
    rest = torch.ones(len(candidates), dtype=torch.bool)
    rest[picked] = False
    left = candidates[rest]
    return candidates[picked], left[torch.randperm(len(left), generator=generator)[:second]]


class Fit(NamedTuple):
    """A regression of the outcomes on what was there.

    Attributes:
        worth: (U,) what each unit adds.
        strength: of the penalty that was chosen, as a share of the one that zeroes all.
        tau: Kendall's, between outcomes and what fits to other pairs say of them; the mean over
            folds.
    """

    worth: Tensor
    strength: float
    tau: float


def regress(there: Tensor, outcomes: Tensor) -> Fit:
    """Lasso with the strength at which outcomes that were not fitted to come in the best order.

    Args:
        there: (M, U), 1 where a unit was there and 0 where not; rows 2 i and 2 i + 1 are a pair.
        outcomes: (M,), higher = better.
    """
    X, y = there.double().numpy(), outcomes.double().numpy()
    pair = np.arange(len(y)) // 2
    taus = np.mean([_tau_of_fold(X, y, pair % FOLDS == fold) for fold in range(FOLDS)], axis=0)
    best = int(taus.argmax())  # the first of equals: the strongest penalty
    worth = _paths(X, y, STRENGTHS[: best + 1])[:, -1]
    return Fit(torch.from_numpy(worth.copy()).float(), float(STRENGTHS[best]), float(taus[best]))


def _tau_of_fold(X: Floats, y: Floats, held: NDArray[np.bool_]) -> Floats:
    """(strengths,) Kendall's tau on the rows `held` of fits to the others; 0 for a constant."""
    from scipy.stats import kendalltau

    guesses = X[held] @ _paths(X[~held], y[~held], STRENGTHS)
    taus: Floats = np.nan_to_num([kendalltau(guess, y[held]).statistic for guess in guesses.T])
    return taus


def _paths(X: Floats, y: Floats, strengths: Floats) -> Floats:
    """(U, strengths) coefficients."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import lasso_path

    X, y = X - X.mean(0), y - y.mean()
    largest = np.abs(X.T @ y).max() / len(y)
    if not largest > 0:  # all did alike
        return np.zeros((X.shape[1], len(strengths)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of the weakest, which lose
        paths: Floats = lasso_path(X, y, alphas=largest * strengths)[1]
    return paths
