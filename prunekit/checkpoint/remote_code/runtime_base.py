"""What all run-time modules have in common. Written by prunekit beside the weights; imports nothing
of prunekit.
"""

from __future__ import annotations

from typing import Any

from torch import nn

LAYOUT = "prunekit_layout"


class RuntimeModule(nn.Module):
    """Base of all kinds. The constructor takes plain numbers, strings and lists of them, and makes
    tensors of the right shapes.
    """

    def numbers(self) -> dict[str, Any]:
        """The constructor's arguments that give this module again, up to the values of its
        tensors.
        """
        return {}

    def attach(self, model: nn.Module, path: str) -> None:
        """Register on other modules what this one, standing at `path`, does there; most do
        nothing.
        """


def owner(model: nn.Module, name: str) -> tuple[Any, str]:
    """The module that holds what the dotted `name` names, and its last part. Raises ValueError
    where there is none.
    """
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise ValueError(
            f"config.json: {LAYOUT} names {name!r}, but the model has no module {path!r}"
        ) from None
    return module, leaf
