"""The linear modules that read what the units of a group compute: where a unit's output meets the rest of the network."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from prunekit.types import Group, Member


class Reader(NamedTuple):
    """A linear module (`o_proj`, `down_proj`) whose input channels belong to the units as `member` says."""

    name: str
    module: nn.Module
    member: Member

    @property
    def weight(self) -> Tensor:
        """`(out, in)`, whichever way the module stores it."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return weight if isinstance(self.module, nn.Linear) else weight.T


def readers(model: nn.Module, group: Group) -> list[Reader]:
    """The readers of a group, in the order of the forward pass; transformers' Conv1D counts as linear."""
    found = []
    for m in group.members:
        name, _, leaf = m.param.rpartition(".")
        module = model.get_submodule(name)
        input_axis = 1 if isinstance(module, nn.Linear) else 0 if type(module).__name__ == "Conv1D" else None
        if leaf == "weight" and m.axis == input_axis:
            found.append(Reader(name, module, m))
    return found
