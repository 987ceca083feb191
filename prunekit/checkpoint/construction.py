"""Models made from a class and a config without a weight allocated: on the meta device, or around
the tensors of another model.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.checkpoint.state import non_persistent_buffers, tensors
from prunekit.errors import ConfigError


def stock_class(model: nn.Module) -> Any:
    """The class of transformers that a model is, or was before pruning. Raises ConfigError for a
    model of another kind.
    """
    for kind in type(model).__mro__:
        if kind.__module__.startswith("transformers.models."):
            return kind
    raise ConfigError(
        f"{type(model).__module__}.{type(model).__name__} is not a model class of transformers, "
        "so its checkpoint could not be loaded "
        "without its code. Possible: a causal language model of transformers, with adapters "
        "merged; or keep pruning.json and replay it"
    )


def clean_config(config: Any) -> Any:
    """A copy of the config without what an earlier checkpoint added to it."""
    from prunekit.checkpoint.remote_code.runtime_base import LAYOUT

    config = copy.deepcopy(config)
    layout = config.__dict__.pop(LAYOUT, None)
    if layout is not None:
        config.per_layer_config = layout.get("native")
        config.__dict__.pop("allow_global_per_layer_attribute_access", None)
    config.__dict__.pop("auto_map", None)
    return config


def build_on_meta(kind: Any, config: Any) -> nn.Module:
    """The model that class `kind` builds from `config`, on the meta device."""
    config = copy.deepcopy(config)
    with torch.device("meta"):
        model: nn.Module = kind._from_config(
            config, attn_implementation=config._attn_implementation
        )
    return model


def initialise_buffers(model: Any, device: torch.device | str) -> None:
    """Give the buffers outside the weights of a model on the meta device their values, the way
    `from_pretrained` does.
    """
    for module in model.modules():
        for leaf in module._non_persistent_buffers_set:
            buffer = module._buffers.get(leaf)
            if buffer is not None and buffer.is_meta:
                module._buffers[leaf] = _unset(buffer, device)
        module.__dict__.pop("_is_hf_initialized", None)
    for tensor in tensors(model).values():
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    model.initialize_weights()


def _unset(like: Tensor, device: torch.device | str) -> Tensor:
    """A buffer of a value that no initialisation gives, so that one which is never initialised is
    noticed.
    """
    if like.dtype is torch.bool:
        return torch.zeros_like(like, device=device)
    return torch.full_like(
        like, float("nan") if like.is_floating_point() else -(2**15), device=device
    )


def rebuild(model: Any, config: Any, layout: dict[str, Any]) -> Any:
    """The model as a loader would make it from class, config and layout, holding the very tensors
    of `model` (no copy).

    Weights that accelerate keeps elsewhere are on the meta device in both.
    """
    from prunekit.checkpoint.remote_code import modeling_pruned
    from prunekit.checkpoint.remote_code.runtime_base import LAYOUT

    kind, config = stock_class(model), copy.deepcopy(config)
    if layout:
        setattr(config, LAYOUT, layout)
        kind = getattr(modeling_pruned, modeling_pruned.PREFIX + kind.__name__)
    made: Any = build_on_meta(kind, config)
    made.load_state_dict(model.state_dict(), assign=True, strict=True)
    made.tie_weights()
    places = {name: buffer.device for name, buffer in non_persistent_buffers(model)}
    initialise_buffers(made, next(iter(places.values()), torch.device("cpu")))
    for name, buffer in non_persistent_buffers(made):
        path, _, leaf = name.rpartition(".")
        made.get_submodule(path)._buffers[leaf] = buffer.to(places.get(name, buffer.device))
    made.generation_config = copy.deepcopy(model.generation_config)
    return made.train(model.training)
