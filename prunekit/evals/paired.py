"""Two models on the same items: what flipped, and whether that could be chance."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def paired(before: Tensor, after: Tensor) -> dict[str, float]:
    """Of correctness `(N,)`, 0 or 1 each, of the same items: shares that flipped, to wrong and to
    right, the change of accuracy with its paired standard error, and McNemar's exact p.

    The error is that of a mean of N differences of -1, 0 or 1 (0 for one item). p is two-sided:
    given how many flipped, as many to either side are expected by chance; 1 where nothing did.
    Raises ValueError for different numbers of items.
    """
    if before.shape != after.shape or not len(before):
        raise ValueError(f"{tuple(before.shape)} items beside {tuple(after.shape)}")
    from scipy.stats import binomtest

    items = len(before)
    change = after.double() - before.double()
    lost, won = int((change < 0).sum()), int((change > 0).sum())
    error = float(change.std()) / math.sqrt(items) if items > 1 else 0.0
    p = float(binomtest(lost, lost + won, 0.5).pvalue) if lost + won else 1.0
    return {
        "flips": (lost + won) / items,
        "flips_to_wrong": lost / items,
        "flips_to_right": won / items,
        "change": float(change.mean()),
        "change_stderr": error,
        "mcnemar_p": p,
    }


def of_zeros_and_ones(values: list[float]) -> Tensor | None:
    """`(N,)`; None where a value is neither, so that nothing can flip."""
    found = torch.tensor(values)
    return found if bool(((found == 0) | (found == 1)).all()) else None
