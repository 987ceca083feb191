"""Experts and the neurons inside them, in weights that hold all experts at once: one expert's
slices, its neurons as rows, and another order of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from prunekit.architecture.blocks import innermost_around
from prunekit.types import Group, Member, tensor_of


def expert_slabs(model: nn.Module, group: Group) -> list[Member]:
    """The members that hold weights of the experts themselves; the others are the router's rows and
    biases.
    """
    return [
        m for m in group.members if tensor_of(model, m.param).dim() > 2 or m.width > group.width
    ]


def module_around(group: Group) -> str:
    """The innermost module that holds a router and all of its experts."""
    inside = [*(m.param for m in group.members), *group.modules]
    return innermost_around(name.rpartition(".")[0] for name in inside)


def around(path: str) -> list[str]:
    """A module and those around it, the innermost first."""
    first = path.split(".")
    return [".".join(first[:i]) for i in range(len(first), 0, -1)]


def expert_members(model: nn.Module, group: Group) -> list[Member]:
    """Where the experts themselves are, their biases too; not the router's rows."""
    slabs = expert_slabs(model, group)
    owners = {m.param.rpartition(".")[0] for m in slabs}
    router = next(m for m in group.members if m not in slabs)
    return [
        m
        for m in group.members
        if m in slabs or (m is not router and m.param.rpartition(".")[0] in owners)
    ]


def single_experts(model: nn.Module, group: Group) -> list[Member]:
    """`expert_members` with an expert a row of their `index`, whatever a unit is."""
    numbers = expert_numbers(model, group)
    order = numbers.flatten().argsort()
    return [
        replace(m, index=m.index.reshape(numbers.numel(), -1)[order])
        for m in expert_members(model, group)
    ]


def expert_numbers(model: nn.Module, group: Group) -> Tensor:
    """(U, W) the numbers by which a router names the experts of each unit: one, or where it picks
    groups of experts first, one of every group.
    """
    slabs = expert_slabs(model, group)
    return next(m for m in group.members if m not in slabs).index


def unit_of_expert(numbers: Tensor) -> Tensor:
    """(E,) the unit of every expert."""
    units = torch.arange(len(numbers), device=numbers.device)
    return torch.empty_like(numbers.flatten()).scatter_(
        0, numbers.flatten(), units.repeat_interleave(numbers.shape[1])
    )


def neurons_inside(groups: Sequence[Group], slabs: Sequence[Member]) -> Group | None:
    """The neurons of the experts whose weights are `slabs`: unit u is neuron u of each of them."""
    names = {m.param for m in slabs}
    inside = [g for g in groups if g.kind == "neurons" and {m.param for m in g.members} <= names]
    return max(inside, key=lambda g: len(g.members), default=None)


def expert_slice(model: nn.Module, member: Member, unit: int) -> Tensor:
    """A copy of what a unit's experts own in one tensor."""
    t = tensor_of(model, member.param).detach()
    return t.index_select(member.axis, member.index[unit].to(t.device))


def put_slice(model: nn.Module, member: Member, unit: int, value: Tensor) -> None:
    """Write what `expert_slice` reads."""
    t = tensor_of(model, member.param).detach()
    t.index_copy_(member.axis, member.index[unit].to(t.device), value.to(t))


def places(slab: Member, neurons: Member, unit: int) -> Tensor:
    """(F, W) where the neurons lie along their axis of `expert_slice(slab, unit)`."""
    if slab.axis != neurons.axis:
        return neurons.index
    own = slab.index[unit]
    inside = torch.isin(neurons.index, own)
    mine = neurons.index[inside].view(len(neurons.index), -1)
    return torch.searchsorted(own, mine)


def neuron_members(slabs: Sequence[Member], neurons: Group) -> Iterator[tuple[Member, Member]]:
    """Pairs of a tensor's two members: its experts, and its neurons."""
    for m in neurons.members:
        for slab in slabs:
            if slab.param == m.param:
                yield slab, m


def reordered(part: Tensor, axis: int, at: Tensor, order: Tensor) -> Tensor:
    """A slice of an expert with its neurons in another order: neuron `order[i]` where i was."""
    to, fro = at.flatten().to(part.device), at[order.to(at.device)].flatten().to(part.device)
    return part.index_copy(axis, to, part.index_select(axis, fro))


def reorder_neurons(
    model: nn.Module, slabs: Sequence[Member], neurons: Group, expert: int, order: Tensor
) -> None:
    """Put neuron `order[i]` of one expert where its neuron i is, which changes nothing of what the
    expert computes. `order` is (F,), `slabs` are those of `single_experts`.
    """
    for slab, m in neuron_members(slabs, neurons):
        part = expert_slice(model, slab, expert)
        put_slice(
            model, slab, expert, reordered(part, m.axis, places(slab, m, expert), order.cpu())
        )
