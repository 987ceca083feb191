"""What units and sub-networks take, in whatever a budget counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from prunekit.errors import ConfigError
from prunekit.selection.latency import latency_prices
from prunekit.selection.prices import (
    Budgeted,
    Prices,
    kv_prices,
    macs_prices,
    memory_prices,
    parameter_prices,
)
from prunekit.types import Group, Remember

SHAPES_TELL: Sequence[Budgeted] = ("model", "prunable", "memory_mib")
"""What needs no run of the model."""

ZEROS_TELL: Sequence[Budgeted] = ("model", "prunable")
"""Of what zeros in matrices save something."""


def check_saved(groups: Sequence[Group], of: Budgeted) -> None:
    """Raises ConfigError for a budget of which zeros in single matrices save nothing."""
    if of not in ZEROS_TELL and any(g.kind == "weights" for g in groups):
        raise ConfigError(
            f"ratio.of={of}: zeros in the matrices save nothing of it while shapes stay; possible: "
            f"{', '.join(ZEROS_TELL)}"
        )


def prices_of(
    model: nn.Module,
    groups: list[Group],
    of: Budgeted,
    request: Mapping[str, int],
    remember: Remember,
) -> Prices:
    """What the model takes of a budget, and what removing units of each group saves."""
    if of in ("model", "prunable"):
        return parameter_prices(model, groups, of)
    if of == "memory_mib":
        return memory_prices(model, groups)
    if of == "macs":
        return macs_prices(model, groups, request)
    if of == "kv_cache":
        return kv_prices(model, groups, request)
    return latency_prices(model, groups, request, remember)
