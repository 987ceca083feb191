"""What a model is made of, as far as a checkpoint describes it: tensors, numbers that modules keep,
buffers outside the weights.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

IGNORED = {"training", "gradient_checkpointing"}
"""Attributes of modules that say how a model is used, not what it is."""


def numbers(module: nn.Module) -> dict[str, Any]:
    """The public numbers (and tuples of numbers) that a module keeps as attributes, without those
    that follow from its weight.
    """
    from prunekit.checkpoint.remote_code.modeling_pruned import DERIVED

    derived = {
        a for kind, attributes in DERIVED.items() if isinstance(module, kind) for a in attributes
    }
    return {
        k: v
        for k, v in vars(module).items()
        if not k.startswith("_") and k not in IGNORED and k not in derived and is_number(v)
    }


def is_number(value: Any) -> bool:
    """Whether a value is a number, or some numbers in a tuple or list."""
    if isinstance(value, (tuple, list)):
        return len(value) > 0 and all(isinstance(v, (bool, int, float)) for v in value)
    return isinstance(value, (bool, int, float))


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer under every one of its names."""
    unsaved = {name for name, _ in non_persistent_buffers(model)}
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    named.update((n, b) for n, b in model.named_buffers(remove_duplicate=False) if n not in unsaved)
    return named


def non_persistent_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Name and value of each buffer that is not saved among the weights."""
    found = []
    for path, module in model.named_modules():
        for leaf in sorted(module._non_persistent_buffers_set):
            buffer = module._buffers.get(leaf)
            if buffer is not None:
                found.append((f"{path}.{leaf}" if path else leaf, buffer))
    return found
