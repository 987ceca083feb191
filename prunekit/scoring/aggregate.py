"""From a value per weight to a value per unit: sum over a channel's weights, over a unit's
channels, over a group's members.

The order is LLM-Pruner's: members are reduced channel by channel first, then the channels of a unit
are summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from prunekit.types import Group, Member

Reduce = Literal["sum", "mean", "max", "prod", "first", "last"]


def channel_sum(values: Tensor, axis: int) -> Tensor:
    """Sum of `values` over every dimension but `axis`: (size of axis,)."""
    return (
        values.sum(dim=[d for d in range(values.dim()) if d != axis])
        if values.dim() > 1
        else values
    )


def unit_channels(per_channel: Tensor, member: Member, width: int) -> Tensor:
    """(U, width) values of one member. A member with rep * width channels a unit is summed over
    rep.

    With grouped queries a unit owns `rep` query heads of D channels and one kv head of D: query
    channels are folded as (G, rep, D) summed over rep, so each query head counts for its own kv
    head. (The original adds query head j to kv head j mod G.)
    """
    x = per_channel[member.index.to(per_channel.device)]
    if x.shape[1] % width:
        # Members of incommensurable widths (MLA): only a unit's total is meaningful, spread so that
        # sums stay exact.
        return (x.sum(1, keepdim=True) / width).expand(-1, width)
    return x.view(x.shape[0], -1, width).sum(1)


def over_members(parts: Sequence[Tensor], reduce: Reduce) -> Tensor:
    """(M, U, width) stacked member values -> (U,) scores. Raises ValueError for an unknown
    `reduce`.
    """
    x = torch.stack([part.to(parts[0].device) for part in parts])
    match reduce:
        case "sum":
            x = x.sum(0)
        case "mean":
            x = x.mean(0)
        case "max":
            x = x.amax(0)
        case "prod":
            x = x.prod(0)
        case "first":
            x = x[0]
        case "last":
            x = x[-1]
        case _:
            raise ValueError(f"reduce={reduce!r}; possible: sum, mean, max, prod, first, last")
    return x.sum(1)


def scored(group: Group) -> list[Member]:
    """The members that carry a score: all but biases, which LLM-Pruner never scores. A group of
    biases alone keeps them.
    """
    members = [m for m in group.members if "bias" not in m.param.rpartition(".")[2]]
    return members or list(group.members)


def unit_scores(group: Group, per_channel: dict[tuple[str, int], Tensor], reduce: Reduce) -> Tensor:
    """(U,) float32 scores of `group` from values per channel, `per_channel[param, axis]` of shape
    (size of axis,).
    """
    parts = [
        unit_channels(per_channel[m.param, m.axis].float(), m, group.width) for m in scored(group)
    ]
    return over_members(parts, reduce)
