"""Fluctuation of a unit's output over the calibration text (FLAP, An et al., AAAI 2024, arXiv
2312.11983, section 3), and Wanda-sp.

The paper's structures: UL-UM is `ratio.ranking=local`, UL-MM the same with `ratio.per_kind`, AL-AM
`ratio.ranking=global`; the bias that keeps the mean is `pruner.compensate=bias`. Scores are read
off the inputs of the readers alone (`o_proj`, `down_proj`), in one pass.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from prunekit.activations.moments import Moments, moments
from prunekit.architecture.linear import Reader, readers
from prunekit.errors import ConfigError
from prunekit.registry import Natural, criteria
from prunekit.scoring.wanda import read_sizes
from prunekit.types import Group, Run, Scores

Metric = Literal["WIFV", "IFV", "WIFN"]
KINDS = ("heads", "neurons", "inner")


@criteria.register(paper="arXiv 2312.11983", year=2023, needs="data", kinds=KINDS)
def flap(
    model: nn.Module,
    groups: list[Group],
    run: Run,
    *,
    metric: Metric = "WIFV",
    standardize: bool = True,
    heads: Literal["plain", "squared"] = "plain",
    skip: Natural = 0,
) -> Scores:
    """How much a unit's output varies, weighted by the weights that read it; the mean over a unit's
    channels.

    Channel j: `WIFV` var(x_j) sum_i W_ij^2, `IFV` var(x_j), `WIFN` mean_i |W_ij| rms(x_j). The
    variance is exact, over all tokens. `standardize` makes channels comparable across layers: minus
    their mean, by their standard deviation, within each group. `heads=squared` squares the
    values of attention's channels first, as the authors' code does (and the paper does not say).
    `skip` leaves that many tokens at the start of each sample out (the bias has `pruner.skip`): the
    first one often carries huge activations.
    """
    squared = heads == "squared"
    return reader_scores(
        model, groups, run, metric, standardize=standardize, squared=squared, skip=skip
    )


@criteria.register(paper="arXiv 2306.11695, 2312.11983", year=2023, needs="data", kinds=KINDS)
def wanda_sp(model: nn.Module, groups: list[Group], run: Run) -> Scores:
    """Wanda's |w| * norm of the input, its mean over the columns of a unit: the structured Wanda
    that FLAP compares with.
    """
    return reader_scores(model, groups, run, "WIFN")


@torch.no_grad()
def reader_scores(
    model: nn.Module,
    groups: list[Group],
    run: Run,
    metric: Metric,
    *,
    standardize: bool = False,
    squared: bool = False,
    skip: int = 0,
) -> Scores:
    """Channel values at the readers of each group, averaged over a unit's channels and over
    readers.

    squared: values of heads are squared first.

    Raises ConfigError for a group that no linear module reads.
    """
    found = {g.name: readers(model, g) for g in groups}
    for name, rs in found.items():
        if not rs:
            raise ConfigError(
                f"no linear module reads the units of {name}: FLAP and Wanda-sp need one (o_proj, "
                "down_proj)"
            )
    seen = moments(model, dict.fromkeys(r.name for rs in found.values() for r in rs), run, skip)
    scores = {}
    for g in groups:
        parts = []
        for r in found[g.name]:
            values = channel_values(r, seen[r.name], metric)
            if squared and g.kind == "heads":
                values = values.square()
            s = values[r.member.index.to(r.weight.device)]  # (U, width)
            if standardize:  # channels that are all alike, as those of an idle expert, get 0
                s = (s - s.mean()) / s.std().clamp(min=torch.finfo(s.dtype).tiny)
            parts.append(s.mean(1))
        scores[g.name] = torch.stack(parts).mean(0)
    return scores


def channel_values(reader: Reader, x: Moments, metric: Metric) -> Tensor:
    """(in,) one value per input channel of a reader."""
    W = reader.weight.float()  # (out, in)
    match metric:
        case "WIFV":
            return x.variance.to(W.device) * W.square().sum(0)
        case "IFV":
            return x.variance.to(W.device)
        case "WIFN":
            return read_sizes(reader.weight, x)
