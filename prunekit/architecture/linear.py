"""The linear modules that read what the units of a group compute: where a unit's output meets the
rest of the network.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor, nn

from prunekit.errors import ConfigError
from prunekit.types import Group, Member


def is_linear(module: nn.Module) -> bool:
    """transformers' Conv1D counts: it is a linear module that stores its weight transposed."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def weight_of(module: nn.Module) -> Tensor:
    """(out, in) weight of a linear module, whichever way it stores it."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight if isinstance(module, nn.Linear) else weight.T


def makes(model: nn.Module, member: Member) -> bool:
    """Whether a member is the output side of a linear module's weight."""
    path, _, leaf = member.param.rpartition(".")
    module = model.get_submodule(path)
    outputs = int(not isinstance(module, nn.Linear))
    return leaf == "weight" and is_linear(module) and member.axis == outputs


class Reader(NamedTuple):
    """A linear module (`o_proj`, `down_proj`) whose input channels belong to the units as `member`
    says.
    """

    name: str
    module: nn.Module
    member: Member

    @property
    def weight(self) -> Tensor:
        return weight_of(self.module)


def readers(model: nn.Module, group: Group) -> list[Reader]:
    """The readers of a group, in the order of the forward pass."""
    found = []
    for m in group.members:
        name, _, leaf = m.param.rpartition(".")
        module = model.get_submodule(name)
        if leaf == "weight" and is_linear(module) and m.axis == int(isinstance(module, nn.Linear)):
            found.append(Reader(name, module, m))
    return found


def check_read(model: nn.Module, groups: Iterable[Group], pruner: str) -> None:
    """Raises ConfigError naming a group that no linear module reads; shapes are enough to tell."""
    for group in groups:
        if not readers(model, group):
            raise ConfigError(
                f"pruner={pruner} needs a linear module that reads the units, and none reads "
                f"{group.name}: narrow pruner.kinds, or take pruner=oneshot"
            )
