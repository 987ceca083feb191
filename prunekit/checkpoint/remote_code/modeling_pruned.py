"""Builds a pruned causal language model: the architecture's own class of transformers, resized as
config.json says.

Written by prunekit beside the weights, so that `AutoModelForCausalLM.from_pretrained(path,
trust_remote_code=True)` works where prunekit is not installed. `PrunedXyzForCausalLM` is
transformers' `XyzForCausalLM` whose tensors take the shapes under `prunekit_layout` in config.json.
Nothing here is specific to an architecture, and nothing runs but the building of the model.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import nn
from transformers.generation import GenerationMixin

PREFIX = "Pruned"
LAYOUT = "prunekit_layout"
FIELDS = (
    "shapes",
    "absent",
    "attributes",
    "configs",
    "buffers",
    "arguments",
    "skipped",
    "rotated",
    "native",
)
# What the constructors of torch and of transformers' Conv1D derive from the shape of `weight`:
# attribute -> axis; None: see `follow_weight`
DERIVED: dict[type, dict[str, int | None]] = {
    nn.Linear: {"out_features": 0, "in_features": 1},
    nn.Embedding: {"num_embeddings": 0, "embedding_dim": 1},
    transformers.pytorch_utils.Conv1D: {"nx": 0, "nf": 1},
    nn.Conv1d: {"out_channels": 0, "in_channels": None, "groups": None},
    nn.LayerNorm: {"normalized_shape": None},
}


class Skipped(nn.Module):
    """Stands where a sub-layer was removed: adds nothing to the residual stream. `outputs` > 1
    gives a tuple padded with None.
    """

    def __init__(self, outputs: int = 1):
        super().__init__()
        self.outputs = outputs

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs):
        nothing = torch.zeros_like(hidden_states)
        return nothing if self.outputs == 1 else (nothing, *[None] * (self.outputs - 1))


class Rotation(nn.Module):
    """Carries the residual stream from one basis to the next; it lives in the module whose input or
    output it changes.

    Without `source` what enters the module is multiplied by `weight`. With it, `-(x @ weight) @
    weight.T` is added to what leaves the module, `x` being what entered `source`: in a block that
    computes `x + module(source(x))`, the sum's `x` becomes `x (I - w w^T)`.
    """

    def __init__(self, source: str):
        super().__init__()
        self.source = source
        self.weight = nn.Parameter(torch.zeros(1, 1))
        self.held: Any = None

    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]):
        if args:
            return (args[0] @ self.weight, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] @ self.weight}

    def hold(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.held = args[0] if args else kwargs["hidden_states"]

    def leave(self, module: nn.Module, args: tuple, out: Any) -> Any:
        x, self.held = self.held, None
        change = (x @ self.weight) @ self.weight.T
        return out - change if isinstance(out, torch.Tensor) else (out[0] - change, *out[1:])


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


def skip(model: nn.Module, skipped: dict[str, int]) -> None:
    """Replace the sub-layers named by nothing; the number says how many outputs each returns."""
    for path, outputs in skipped.items():
        module, leaf = owner(model, path)
        setattr(module, leaf, Skipped(int(outputs)))


def rotate(model: nn.Module, path: str, source: str = "") -> Rotation:
    """Give the module at `path` a rotation, whose weight `resize` or the caller sets."""
    module = owner(model, f"{path}.rotation")[0]
    like = next(module.parameters())
    module.rotation = rotation = Rotation(source).to(device=like.device, dtype=like.dtype)
    if source:
        owner(model, f"{source}.weight")[0].register_forward_pre_hook(
            rotation.hold, with_kwargs=True
        )
        module.register_forward_hook(rotation.leave)
    else:
        module.register_forward_pre_hook(rotation.enter, with_kwargs=True)
    return rotation


def select_arguments(model: nn.Module, arguments: list[dict[str, Any]]) -> None:
    """Let modules see only some indices along one axis of an argument that is computed outside of
    them (ALiBi slopes).
    """
    for entry in arguments:
        module = owner(model, f"{entry['module']}.forward")[0]
        module.register_forward_pre_hook(
            _selector(entry["argument"], entry["axis"], entry["size"], entry["keep"]),
            with_kwargs=True,
        )


def _selector(argument: Any, axis: int, size: int, keep: list[int]) -> Any:
    def pick(module: Any, args: Any, kwargs: Any) -> Any:
        tensor = (
            (args[argument] if argument < len(args) else None)
            if isinstance(argument, int)
            else kwargs.get(argument)
        )
        if not isinstance(tensor, torch.Tensor) or tensor.shape[axis] % size:
            return None
        one = torch.tensor(keep, device=tensor.device)
        index = torch.cat([one + size * i for i in range(tensor.shape[axis] // size)])
        tensor = tensor.index_select(axis, index)
        if isinstance(argument, int):
            return (*args[:argument], tensor, *args[argument + 1 :]), kwargs
        return args, {**kwargs, argument: tensor}

    pick.prunekit_argument = {  # type: ignore[attr-defined]
        "argument": argument,
        "axis": axis,
        "size": size,
        "keep": keep,
    }
    return pick


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
    """Turn a model fresh from its own class into the pruned one. Raises ValueError for anything
    that does not fit it.
    """
    unknown = set(layout) - set(FIELDS)
    if unknown:
        raise ValueError(
            f"config.json: {LAYOUT} has unknown fields {sorted(unknown)}; known are {list(FIELDS)}"
        )
    skip(model, layout.get("skipped", {}))
    for path, source in layout.get("rotated", {}).items():
        rotate(model, path, source)
    for name in layout.get("absent", []):
        module, leaf = owner(model, name)
        module.register_parameter(leaf, None)
    resize(model, layout.get("shapes", {}))
    set_attributes(model, layout.get("attributes", {}))
    set_configs(model, layout.get("configs", {}))
    select_arguments(model, layout.get("arguments", []))
    fill_buffers(model, layout.get("buffers", {}))


def pruned_class(base: Any) -> type:
    """The subclass of a transformers model class that `build`s itself from its config."""

    def __init__(self, config, *args, **kwargs):
        base.__init__(self, config, *args, **kwargs)
        build(self, getattr(config, LAYOUT, {}))
        self._prunekit_built = True

    def initialize_weights(self):
        base.initialize_weights(self)
        if getattr(self, "_prunekit_built", False):
            fill_buffers(self, getattr(self.config, LAYOUT, {}).get("buffers", {}))

    name = PREFIX + base.__name__
    body = {
        "__init__": __init__,
        "initialize_weights": initialize_weights,
        "__module__": __name__,
        "__qualname__": name,
    }
    bases = (base, GenerationMixin) if issubclass(base, GenerationMixin) else (base,)
    made: Any = type(name, bases, body)
    made._auto_class = "AutoModelForCausalLM"  # saving such a model again copies this file along
    return made


def __getattr__(name: str) -> type:
    base = (
        getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    )
    if not (isinstance(base, type) and issubclass(base, transformers.PreTrainedModel)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = pruned_class(base)
    return globals()[name]
