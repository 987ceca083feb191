"""Which elements of a matrix go: so many of every row, of the matrix, of all matrices, or of each
run of M inputs. Pure functions.

Matrices are `(outputs, inputs)`; masks are True where an element stays. Ties fall by index, so that
counts are exact.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prunekit.errors import ConfigError
from prunekit.types import Kept, Scores


def share(units: int, part: float) -> int:
    """floor(part * units): 1e-12 keeps a product such as 0.29 * 100 from falling
    below its integer.
    """
    return int(part * units * (1 + 1e-12))


def lowest(scores: Tensor, n: int) -> Tensor:
    """Mask of `scores (R, K)` with the `n` lowest of each row False: a stable sort's answer without
    the sort.
    """
    if n <= 0:
        return torch.ones_like(scores, dtype=torch.bool)
    if n >= scores.shape[1]:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(n, dim=1, keepdim=True).values
    gone, tie = scores < threshold, scores == threshold
    return ~(gone | (tie & (tie.cumsum(1, dtype=torch.int32) <= n - gone.sum(1, keepdim=True))))


def per_row(scores: Tensor, count: int) -> Tensor:
    """Every row loses the same number: `count`, the number for the matrix, divided by the rows and
    rounded down.
    """
    return lowest(scores, count // scores.shape[0])


def per_matrix(scores: Tensor, count: int) -> Tensor:
    """The `count` lowest of the matrix."""
    return lowest(scores.reshape(1, -1), count).view(scores.shape)


def by_alpha(scores: Tensor, count: int) -> Tensor:
    """Every row loses its lowest scores up to the same share alpha of the row's sum (Wanda's
    `use_variant`, arXiv 2306.11695).

    The paper finds alpha by bisection, to 0.1 %; an element goes when its row's sum up to it is at
    most alpha, so the `count` smallest of these sums are the same choice with the count exact.
    Scores must not be negative.
    """
    order = scores.argsort(dim=1, stable=True)
    sums = scores.double().gather(1, order).cumsum(1)
    sums = sums / sums[:, -1:].clamp(min=torch.finfo(torch.float64).tiny)
    return per_matrix(torch.empty_like(sums).scatter_(1, order, sums), count)


def everywhere(scores: Scores, count: int) -> Kept:
    """The `count` lowest of all matrices together (Essential Sparsity, arXiv 2306.03805); a matrix
    may lose all it has.
    """
    mask = lowest(torch.cat([s.reshape(1, -1) for s in scores.values()], 1), count)[0]
    parts = mask.split([s.numel() for s in scores.values()])
    return {name: m.view(s.shape) for (name, s), m in zip(scores.items(), parts, strict=True)}


SCOPES = {"row": per_row, "matrix": per_matrix, "alpha": by_alpha}
"""How the number of elements that a matrix loses is spread over it."""


class Pattern(NamedTuple):
    """`keep_n` of every `block_m` consecutive inputs stay. `keep_n` None: as many as the ratio
    leaves of that matrix, rounded.
    """

    keep_n: int | None
    block_m: int

    def kept_of(self, count: int, units: int, name: str) -> int:
        """How many of a block stay in a matrix that should lose `count` of its `units`. Raises
        ConfigError where the two disagree.
        """
        asked = self.block_m - round(self.block_m * count / units)
        if self.keep_n is not None and asked != self.keep_n:
            raise ConfigError(
                f"{self.keep_n}:{self.block_m} removes {1 - self.keep_n / self.block_m:.4g} of "
                "each matrix, but the ratio asks for "
                f"{count / units:.4g} of {name}: give ratio.of=prunable "
                f"ratio.target={1 - self.keep_n / self.block_m:.4g}, or pruner.keep_n=null"
            )
        return asked

    def mask(self, scores: Tensor, kept: int) -> Tensor:
        """The `kept` highest of each run of `block_m` inputs stay."""
        return lowest(scores.reshape(-1, self.block_m), self.block_m - kept).view(scores.shape)


def pattern(keep_n: int | None, block_m: int | None) -> Pattern | None:
    """The pattern that two options ask for, None for none. Raises ConfigError for half a pattern,
    or one that keeps all or more.
    """
    if block_m is None:
        if keep_n is not None:
            raise ConfigError(
                f"pruner.keep_n={keep_n} needs pruner.block_m: 2:4 is keep_n=2 block_m=4"
            )
        return None
    if keep_n is not None and keep_n >= block_m:
        raise ConfigError(f"pruner.keep_n={keep_n} must be smaller than pruner.block_m={block_m}")
    return Pattern(keep_n, block_m)
