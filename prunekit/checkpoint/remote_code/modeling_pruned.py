"""Builds a pruned causal language model: the architecture's own class of transformers, resized as
config.json says.

Written by prunekit beside the weights, so that `AutoModelForCausalLM.from_pretrained(path,
trust_remote_code=True)` works where prunekit is not installed. `PrunedXyzForCausalLM` is
transformers' `XyzForCausalLM` with what `prunekit_layout` in config.json changes: the shapes of
tensors, and modules that the class has not (`runtime_modules.py`). Nothing here is specific to an
architecture, and nothing runs but the building of the model.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import nn
from transformers.generation.utils import GenerationMixin

from .runtime_base import LAYOUT, owner
from .runtime_modules import build_modules

PREFIX = "Pruned"
FIELDS = ("modules", "shapes", "absent", "attributes", "configs", "buffers", "native")
# What the constructors of torch and of transformers' Conv1D derive from the shape of `weight`:
# attribute -> axis; None: see `follow_weight`
DERIVED: dict[type, dict[str, int | None]] = {
    nn.Linear: {"out_features": 0, "in_features": 1},
    nn.Embedding: {"num_embeddings": 0, "embedding_dim": 1},
    transformers.pytorch_utils.Conv1D: {"nx": 0, "nf": 1},
    nn.Conv1d: {"out_channels": 0, "in_channels": None, "groups": None},
    nn.LayerNorm: {"normalized_shape": None},
}


def follow_weight(module: Any) -> None:
    """Bring the integers that a torch module keeps about its weight in line with the weight's
    shape.
    """
    weight = getattr(module, "weight", None)
    if weight is None:
        return
    for kind, attributes in DERIVED.items():
        if isinstance(module, kind):
            for attribute, axis in attributes.items():
                if axis is not None:
                    setattr(module, attribute, weight.shape[axis])
    if isinstance(module, nn.Conv1d):
        depthwise = (
            module.groups == module.in_channels and weight.shape[1] == 1
        )  # one group a channel
        module.groups = weight.shape[0] if depthwise else module.groups
        module.in_channels = weight.shape[1] * module.groups
    if isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(weight.shape)


def resize(model: nn.Module, shapes: dict[str, str]) -> None:
    """Give each tensor named in `shapes` its shape ("96x64"); tensors that were tied stay tied,
    missing ones are added.
    """
    done: dict[int, torch.Tensor] = {}
    for name, text in shapes.items():
        sizes = [int(size) for size in text.split("x")]
        module, leaf = owner(model, name)
        old = module._parameters.get(leaf, module._buffers.get(leaf))
        if min(sizes) < 1 or (old is None and leaf in vars(module)):
            raise ValueError(
                f"config.json: {LAYOUT}.shapes: {name!r} cannot have the shape {text!r}"
            )
        like = old if old is not None else next(module.parameters(), torch.empty(0))
        new = done.get(id(old)) if old is not None else None
        if new is None:
            new = torch.zeros(sizes, dtype=like.dtype, device=like.device)
            if leaf not in module._buffers:
                new = nn.Parameter(new, requires_grad=like.requires_grad)
        if old is not None:
            done[id(old)] = new
        if leaf in module._buffers:
            module._buffers[leaf] = new
        else:
            module.register_parameter(leaf, new)
        follow_weight(module)


def set_attributes(model: nn.Module, attributes: dict[str, Any]) -> None:
    """Set numbers that modules keep as attributes. Only attributes that exist, and only to numbers,
    are accepted.
    """
    for name, value in attributes.items():
        module, leaf = owner(model, name)
        flat = value if isinstance(value, list) else [value]
        if (
            leaf.startswith("_")
            or leaf not in vars(module)
            or not all(isinstance(v, (bool, int, float)) for v in flat)
        ):
            raise ValueError(
                f"config.json: {LAYOUT}.attributes: {name!r} cannot be set to {value!r}"
            )
        setattr(module, leaf, tuple(value) if isinstance(value, list) else value)


def set_configs(model: nn.Module, configs: dict[str, dict[str, Any]]) -> None:
    """Give the modules named a config of their own, with some numbers changed; all others keep the
    shared one.
    """
    copies: dict[tuple[int, str], Any] = {}
    for path, changes in configs.items():
        module, _ = owner(model, path + ".config")
        shared = module.config
        key = (id(shared), repr(sorted(changes.items())))
        if key not in copies:
            own = copy.copy(shared)
            own.__dict__.pop("_heterogeneity_spec", None)
            for field, value in changes.items():
                if field.startswith("_") or not hasattr(own, field):
                    raise ValueError(
                        f"config.json: {LAYOUT}.configs: {path!r} has no field {field!r}"
                    )
                own.__dict__[own.attribute_map.get(field, field)] = value
            copies[key] = own
        module.config = copies[key]


def fill_buffers(model: nn.Module, buffers: dict[str, dict[str, Any]]) -> None:
    """Write the values of buffers that are not among the weights (rotary frequencies, embedding
    scale).
    """
    for name, entry in buffers.items():
        module, leaf = owner(model, name)
        old = module._buffers[leaf]
        if old.device.type != "meta":
            values = torch.tensor(
                entry["values"], dtype=getattr(torch, entry["dtype"]), device=old.device
            )
            module._buffers[leaf] = values.reshape(entry["shape"])
            module._buffers[leaf]._is_hf_initialized = True


def build(model: nn.Module, layout: dict[str, Any]) -> None:
    """Turn a model that its own class built into the pruned one. Raises ValueError for anything
    that does not fit it.
    """
    unknown = set(layout) - set(FIELDS)
    if unknown:
        raise ValueError(
            f"config.json: {LAYOUT} has unknown fields {sorted(unknown)}; known are {list(FIELDS)}"
        )
    build_modules(model, layout.get("modules", []))
    for name in layout.get("absent", []):
        module, leaf = owner(model, name)
        module.register_parameter(leaf, None)
    resize(model, layout.get("shapes", {}))
    set_attributes(model, layout.get("attributes", {}))
    set_configs(model, layout.get("configs", {}))
    fill_buffers(model, layout.get("buffers", {}))


def layout_of(model: Any) -> dict[str, Any]:
    """The layout in the model's config, which names modules as the causal language model does; for
    its base model, which serving engines put a head of their own on, what lies in that.
    """
    layout: dict[str, Any] = getattr(model.config, LAYOUT, {})
    head = model.base_model_prefix + "."
    # Llama 4's prefix names no module of its causal model.
    if hasattr(model, model.base_model_prefix) or model.get_output_embeddings() is not None:
        return layout
    inside: dict[str, Any] = {k: v for k, v in layout.items() if k == "native"}
    for field in ("shapes", "attributes", "configs", "buffers"):
        named = layout.get(field, {}).items()
        inside[field] = {k.removeprefix(head): v for k, v in named if k.startswith(head)}
    absent = layout.get("absent", [])
    inside["absent"] = [name.removeprefix(head) for name in absent if name.startswith(head)]
    inside["modules"] = [
        {k: v.removeprefix(head) if k in ("path", "source") else v for k, v in entry.items()}
        for entry in layout.get("modules", [])
        if entry.get("path", "").startswith(head)
    ]
    return inside


def pruned_class(base: Any) -> type[nn.Module]:
    """The subclass of a transformers model class that `build`s itself from its config."""
    causal = base.__name__.endswith(("ForCausalLM", "LMHeadModel"))

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        build(self, layout_of(self))
        self._prunekit_built = True

    # vLLM asks isinstance() of what is annotated, and here that is a string.
    __init__.__annotations__.clear()

    def initialize_weights(self: Any) -> None:
        base.initialize_weights(self)
        if getattr(self, "_prunekit_built", False):
            fill_buffers(self, layout_of(self).get("buffers", {}))

    name = PREFIX + base.__name__
    body = {
        "__init__": __init__,
        "initialize_weights": initialize_weights,
        "__module__": __name__,
        "__qualname__": name,
        # Saving such a model again copies the files along.
        "_auto_class": "AutoModelForCausalLM" if causal else "AutoModel",
    }
    bases = (base, GenerationMixin) if issubclass(base, GenerationMixin) else (base,)
    made: type[nn.Module] = type(name, bases, body)
    return made


def __getattr__(name: str) -> type[nn.Module]:
    base = (
        getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    )
    if not (isinstance(base, type) and issubclass(base, transformers.PreTrainedModel)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = made = pruned_class(base)
    return made
