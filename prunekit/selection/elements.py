"""Which elements of a matrix go: so many of every row, of the matrix, of all matrices, or of each
run of M inputs. Pure functions.

Matrices are `(outputs, inputs)`; masks are True where an element stays. Ties fall by index, so that
counts are exact.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import BeforeValidator
from torch import Tensor, nn

from prunekit.architecture.matrices import matrix
from prunekit.errors import ConfigError
from prunekit.types import Counts, Group, Kept, Scores

log = logging.getLogger("prunekit")


def floor_share(units: int, part: float) -> int:
    """floor(part * units): 1e-12 keeps a product such as 0.29 * 100 from falling
    below its integer.
    """
    return int(part * units * (1 + 1e-12))


def drop_lowest(scores: Tensor, n: int) -> Tensor:
    """Mask of `scores (R, K)` with the `n` lowest of each row False: a stable sort's answer without
    the sort.
    """
    if n <= 0:
        return torch.ones_like(scores, dtype=torch.bool)
    if n >= scores.shape[1]:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = _nth_lowest(scores, n)
    gone, tie = scores < threshold, scores == threshold
    return ~(gone | (tie & (tie.cumsum(1, dtype=torch.int32) <= n - gone.sum(1, keepdim=True))))


def _nth_lowest(scores: Tensor, n: int) -> Tensor:
    """(R, 1) of each row."""
    if torch.are_deterministic_algorithms_enabled():
        # A GPU's kthvalue is refused then, for the indices of equal values: the value is the same.
        return scores.sort(dim=1).values[:, n - 1 : n]
    return scores.kthvalue(n, dim=1, keepdim=True).values


def running_sums(x: Tensor) -> Tensor:
    """Sums of each row `(R, K)` up to each column."""
    if torch.are_deterministic_algorithms_enabled():
        return x.cpu().cumsum(1).to(x.device)  # floats on a GPU have no form that is repeatable
    return x.cumsum(1)


def per_row(scores: Tensor, count: int) -> Tensor:
    """Every row loses the same number: `count`, the number for the matrix, divided by the rows and
    rounded down.
    """
    return drop_lowest(scores, count // scores.shape[0])


def or_sizes(scores: Tensor, weight: Tensor, name: str) -> Tensor:
    """`scores` of a matrix, or where all are 0 (no token reached it) its weights' sizes, which is
    said.
    """
    if scores.any() or not weight.any():
        return scores
    log.warning("%s scores 0 throughout (no token reached it?): by size alone", name)
    return weight.float().abs()


def each_row(scores: Tensor, counts: Tensor) -> Tensor:
    """Row i loses its `counts[i]` lowest."""
    order = scores.argsort(dim=1, stable=True)
    stays = torch.arange(scores.shape[1], device=scores.device) >= counts.to(scores.device)[:, None]
    return torch.empty_like(stays).scatter_(1, order, stays)


def per_matrix(scores: Tensor, count: int) -> Tensor:
    """The `count` lowest of the matrix."""
    return drop_lowest(scores.reshape(1, -1), count).view(scores.shape)


def by_alpha(scores: Tensor, count: int) -> Tensor:
    """Every row loses its lowest scores up to the same share alpha of the row's sum (Wanda's
    `use_variant`, arXiv 2306.11695).

    The paper finds alpha by bisection, to 0.1 %; an element goes when its row's sum up to it is at
    most alpha, so the `count` smallest of these sums are the same choice with the count exact.
    Scores must not be negative.
    """
    order = scores.argsort(dim=1, stable=True)
    sums = running_sums(scores.double().gather(1, order))
    sums = sums / sums[:, -1:].clamp(min=torch.finfo(torch.float64).tiny)
    return per_matrix(torch.empty_like(sums).scatter_(1, order, sums), count)


def everywhere(scores: Scores, count: int) -> Kept:
    """The `count` lowest of all matrices together (Essential Sparsity, arXiv 2306.03805); a matrix
    may lose all it has.
    """
    device = next(iter(scores.values())).device
    pool = torch.cat([s.reshape(1, -1).to(device) for s in scores.values()], 1)
    parts = drop_lowest(pool, count)[0].split([s.numel() for s in scores.values()])
    return {
        name: m.view(s.shape).to(s.device)
        for (name, s), m in zip(scores.items(), parts, strict=True)
    }


Scope = Literal["row", "matrix", "alpha"]
SCOPES = {"row": per_row, "matrix": per_matrix, "alpha": by_alpha}
"""How the number of elements that a matrix loses is spread over it."""


def of_each_run(scores: Tensor, kept: int, m: int) -> Tensor:
    """The `kept` highest of each run of `m` consecutive inputs stay."""
    return drop_lowest(scores.reshape(-1, m), m - kept).view(scores.shape)


AGREE = 0.005
"""By how much of a matrix a ratio may miss what a pattern takes."""


class Pattern(NamedTuple):
    """Of every `m` consecutive inputs `n` stay; `n` None: as many as the ratio leaves of that
    matrix, rounded.
    """

    n: int | None
    m: int

    def kept_of(self, count: int, units: int, name: str) -> int:
        """How many of a run stay in a matrix that should lose `count` of its `units`.

        Raises ConfigError where the two disagree, or none would stay.
        """
        asked = count / units
        if self.n is not None:
            share = 1 - self.n / self.m
            if abs(asked - share) > AGREE:
                raise ConfigError(
                    f"pruner.pattern={self.n}:{self.m} removes {share:.4g} of each matrix, but the "
                    f"ratio asks for {asked:.4g} of {name}: give ratio.of=prunable "
                    f"ratio.target={share:.4g}, or pruner.pattern=N:{self.m}"
                )
            return self.n
        stays = self.m - round(self.m * asked)
        if not stays:
            raise ConfigError(
                f"pruner.pattern=N:{self.m} would leave nothing of {name}, of which the ratio "
                f"takes {asked:.4g}: give a smaller ratio, or runs of more than {self.m}"
            )
        return stays

    def gone_of(self, count: int, units: int, name: str) -> int:
        """How many elements of such a matrix go. Raises ConfigError as `kept_of` does."""
        return units // self.m * (self.m - self.kept_of(count, units, name))


def element_mask(
    scores: Tensor, count: int, scope: Scope, pattern: Pattern | None, name: str
) -> Tensor:
    """What of the matrix `name` stays when `count` of its elements go. Raises ConfigError where the
    pattern is not what the count asks for.
    """
    if pattern:
        return of_each_run(scores, pattern.kept_of(count, scores.numel(), name), pattern.m)
    return SCOPES[scope](scores, count)


def parse_pattern(text: Any) -> Pattern | None:
    """`"2:4"` -> 2 of 4 stay, `"N:8"` -> as many of 8 as the ratio leaves, None -> no pattern.

    Raises ValueError for anything else, and for a pattern that keeps all or more.
    """
    if text is None or isinstance(text, Pattern):
        return text
    found = re.fullmatch(r"(N|\d+):(\d+)", str(text))
    if found is None:
        raise ValueError(f"{text!r} is no pattern such as '2:4' or 'N:8' (in quotes in YAML)")
    n, m = None if found[1] == "N" else int(found[1]), int(found[2])
    if m < 2 or n is not None and not 0 < n < m:
        raise ValueError(f"{text}: of M >= 2 inputs at least one must stay and one must go")
    return Pattern(n, m)


NM = Annotated[Pattern | None, BeforeValidator(parse_pattern)]
"""An option that is a pattern or null."""


def check_pattern(
    model: nn.Module,
    groups: Sequence[Group],
    counts: Counts | None,
    pattern: Pattern | None,
    axes: Mapping[str, int] | None = None,
) -> None:
    """Raises ConfigError where a pattern does not divide a matrix, is not what the ratio asks for,
    or takes nothing at all; `counts` None where only weights and text can tell them. `axes` names
    matrices whose runs lie along the outputs (0) and not the inputs (1).
    """
    if pattern is None:
        return
    for g in groups:
        if counts is not None and not counts.get(g.name):
            continue
        axis = (axes or {}).get(g.name, 1)
        size = matrix(model, g).shape[axis]
        if size % pattern.m:
            raise ConfigError(
                f"{g.name} has {size} {('outputs', 'inputs')[axis]}, which the {pattern.m} of "
                "pruner.pattern do not divide: narrow pruner.targets"
            )
    if counts is not None:
        check_taken(groups, counts, pattern)


def check_taken(groups: Iterable[Group], counts: Counts, pattern: Pattern) -> None:
    """Raises ConfigError where a pattern is not what the ratio asks for, or takes nothing at all
    though the ratio does.
    """
    losing = [g for g in groups if counts.get(g.name)]
    took = sum(pattern.gone_of(counts[g.name], g.units, g.name) for g in losing)
    if losing and not took:
        raise ConfigError(
            f"pruner.pattern=N:{pattern.m} takes nothing where the ratio asks for less than half "
            f"of {1 / pattern.m:.4g}: give a larger ratio, or longer runs"
        )
