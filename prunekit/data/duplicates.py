"""Rows of tokens that repeat others."""

from __future__ import annotations

import torch
from torch import Tensor

RUN = 16
"""Tokens in a row that are taken for the same text wherever they occur."""


def _runs(rows: Tensor, size: int) -> Tensor:
    """A 64-bit hash of every run of `size` tokens `(N, T - size + 1)`."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (size,), generator=generator)
    return (rows.unfold(1, size, 1) * factors).sum(-1)  # int64 wraps


def new_rows(rows: Tensor, known: Tensor, share: float = 0.5) -> Tensor:
    """Which rows `(N, T)` are new text: at most `share` of their runs of 16 tokens occur in `known
    (M, T)` or in an earlier new row. `(N,)` bool.
    """
    size = min(RUN, rows.shape[1])
    seen = _runs(known, size).flatten()
    new = torch.zeros(len(rows), dtype=torch.bool)
    for i, row in enumerate(_runs(rows, size)):
        new[i] = torch.isin(row, seen).float().mean() <= share
        if new[i]:
            seen = torch.cat([seen, row])
    return new
