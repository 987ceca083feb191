"""The weights of one expert: slices of tensors that hold all of them, or a module of a list."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunekit.errors import ConfigError
from prunekit.graph.expert_neurons import (
    expert_members,
    expert_slabs,
    expert_slice,
    neuron_members,
    neurons_inside,
    places,
    put_slice,
    reordered,
)
from prunekit.types import Group, Member


@dataclass(frozen=True, eq=False)
class ExpertBody:
    """One expert: what it owns of each tensor, by a name that is the same for all of its router.

    Attributes:
        parts: name -> the tensor's member of which row `row` is the expert's own; of a module of a
            list the whole parameter.
        row: its number in a tensor with others.
        neurons: of the expert; None where they are not known.
    """

    parts: dict[str, Member | str]
    row: int
    neurons: Group | None

    def read(self, model: nn.Module, name: str) -> Tensor:
        """A copy of one part."""
        part = self.parts[name]
        if isinstance(part, str):
            return model.get_parameter(part).detach().clone()
        return expert_slice(model, part, self.row)

    def write(self, model: nn.Module, name: str, value: Tensor) -> None:
        """Write what `read` reads."""
        part = self.parts[name]
        if isinstance(part, str):
            own = model.get_parameter(part).detach()
            own.copy_(value.to(own))
        else:
            put_slice(model, part, self.row, value)

    def along(self) -> Iterator[tuple[str, int, Tensor]]:
        """The parts that neurons run through, the axis, and their places `(F, W)` along it."""
        assert self.neurons is not None
        for name, part in self.parts.items():
            if isinstance(part, str):
                own = [m for m in self.neurons.members if m.param == part]
                yield from ((name, m.axis, m.index) for m in own)
            else:
                pairs = neuron_members([part], self.neurons)
                yield from ((name, m.axis, places(slab, m, self.row)) for slab, m in pairs)

    def rows(self, model: nn.Module) -> Tensor:
        """(F, D) float32: all weights of each neuron, side by side."""
        found = []
        for name, axis, at in self.along():
            part = self.read(model, name)
            taken = part.index_select(axis, at.flatten().to(part.device)).movedim(axis, 0)
            found.append(taken.reshape(len(at), -1).float())
        return torch.cat(found, 1)

    def reordered(self, model: nn.Module, order: Tensor | None) -> dict[str, Tensor]:
        """All parts in float32, with neuron `order[i]` where neuron i was."""
        values = {name: self.read(model, name).float() for name in self.parts}
        if order is not None:
            for name, axis, at in self.along():
                values[name] = reordered(values[name], axis, at, order)
        return values


def expert_bodies(model: nn.Module, group: Group, groups: Sequence[Group]) -> list[ExpertBody]:
    """The experts of `group`, in the order of its units; `groups` are all of the model."""
    if not group.modules:
        members = expert_members(model, group)
        neurons = neurons_inside(groups, members)
        parts: dict[str, Member | str] = {m.param: m for m in members}
        return [ExpertBody(parts, e, neurons) for e in range(group.units)]
    found = []
    for path in group.modules:
        inside = {n: f"{path}.{n}" for n, _ in model.get_submodule(path).named_parameters()}
        owned = set(inside.values())
        own = [g for g in groups if g.kind == "neurons" and {m.param for m in g.members} <= owned]
        found.append(ExpertBody(dict(inside), 0, own[0] if len(own) == 1 else None))
    return found


def check_alike(model: nn.Module, group: Group) -> None:
    """Raises ConfigError where experts of a list differ in the names or shapes of what they own, or
    where none are known.
    """
    if not group.modules:
        if not expert_slabs(model, group):
            raise ConfigError(f"{group.name}: the weights of its experts are not known")
        return
    shapes = [
        {n: tuple(p.shape) for n, p in model.get_submodule(path).named_parameters()}
        for path in group.modules
    ]
    other = next((i for i, s in enumerate(shapes) if s != shapes[0]), None)
    if other is not None:
        raise ConfigError(
            f"{group.modules[other]} is not built like {group.modules[0]}: only experts with the "
            "same names and shapes can be merged; take criterion=experts"
        )
