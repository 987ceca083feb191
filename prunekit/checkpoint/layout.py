"""What a pruned model is, told as the difference from a fresh model of its own class: shapes,
numbers, configs, buffers.

The difference is measured, not remembered, so whatever changed the model in memory (any pruner, any
number of times) is caught.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from torch import nn

from prunekit.errors import ConfigError

IGNORED = {"training", "gradient_checkpointing"}
"""Attributes of modules that say how a model is used, not what it is."""
LARGEST_BUFFER = 1 << 16
"""A buffer outside the weights is written into config.json; more elements than this are refused."""


def stock_class(model: nn.Module) -> type:
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
    from prunekit.checkpoint.remote_code.runtime_modules import LAYOUT

    config = copy.deepcopy(config)
    layout = config.__dict__.pop(LAYOUT, None)
    if layout is not None:
        config.per_layer_config = layout.get("native")
        config.__dict__.pop("allow_global_per_layer_attribute_access", None)
    config.__dict__.pop("auto_map", None)
    return config


def fresh(kind: Any, config: Any) -> nn.Module:
    """A model of class `kind` on the meta device: no weights are allocated."""
    config = copy.deepcopy(config)
    with torch.device("meta"):
        return kind._from_config(config, attn_implementation=config._attn_implementation)


def numbers(module: nn.Module) -> dict[str, Any]:
    """The public numbers (and tuples of numbers) that a module keeps as attributes, without those
    that its weight tells.
    """
    from prunekit.checkpoint.remote_code.modeling_pruned import DERIVED

    told = {
        a for kind, attributes in DERIVED.items() if isinstance(module, kind) for a in attributes
    }
    return {
        k: v
        for k, v in vars(module).items()
        if not k.startswith("_") and k not in IGNORED and k not in told and _is_number(v)
    }


def _is_number(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return len(value) > 0 and all(isinstance(v, (bool, int, float)) for v in value)
    return isinstance(value, (bool, int, float))


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and persistent buffer under every one of its names."""
    loose = {name for name, _ in loose_buffers(model)}
    named: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    named.update((n, b) for n, b in model.named_buffers(remove_duplicate=False) if n not in loose)
    return named


def loose_buffers(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Buffers that are not saved among the weights."""
    found = []
    for path, module in model.named_modules():
        for leaf in sorted(module._non_persistent_buffers_set):
            if module._buffers.get(leaf) is not None:
                found.append((f"{path}.{leaf}" if path else leaf, module._buffers[leaf]))
    return found


def difference(
    model: nn.Module, config: Any, ignore: frozenset[str] = frozenset(), own_configs: bool = True
) -> dict[str, Any]:
    """The layout: what must be done to a fresh model of `config` to make it the shape of `model`;
    {} where nothing must.

    `ignore` names attributes for which the fresh model's value is taken; without `own_configs` all
    modules read the shared config. Raises ConfigError where the two differ in something that a
    layout cannot tell.
    """
    from prunekit.checkpoint.remote_code import modeling_pruned as carry
    from prunekit.checkpoint.remote_code.runtime_modules import build_modules

    plain = fresh(stock_class(model), config)
    layout: dict[str, Any] = {"modules": run_time_modules(model)}
    with torch.device("meta"):
        build_modules(plain, layout["modules"])
    _compare_modules(model, plain, {entry["path"] for entry in layout["modules"]})
    ours, theirs = tensors(model), tensors(plain)
    layout["absent"] = sorted(n for n in theirs if n not in ours)
    layout["shapes"] = {
        n: "x".join(map(str, t.shape))
        for n, t in ours.items()
        if n not in theirs or t.shape != theirs[n].shape
    }
    with_shapes = {k: layout[k] for k in ("absent", "shapes")}
    carry.build(plain, with_shapes)
    layout["attributes"] = _attributes(model, plain, ignore)
    layout["configs"] = _configs(model, plain) if own_configs else {}
    carry.set_attributes(plain, layout["attributes"])
    carry.set_configs(plain, layout["configs"])
    layout["buffers"] = _buffers(model, plain)
    return {k: v for k, v in layout.items() if v}


def _compare_modules(model: nn.Module, plain: nn.Module, added: set[str]) -> None:
    """Raises ConfigError naming a module that is not of the class that stands in `plain`; `added`
    are those that a loader builds by itself.
    """
    ours = {n: type(m) for n, m in model.named_modules() if n not in added}
    theirs = {n: type(m) for n, m in plain.named_modules() if n not in added}
    for name in sorted(ours.keys() | theirs.keys()):
        mine, stock = ours.get(name), theirs.get(name)
        if (
            name
            and mine is not stock
            and getattr(mine, "__name__", 0) != getattr(stock, "__name__", 1)
        ):
            what = (
                f"{mine.__name__ if mine else 'missing'}, where its config builds "
                f"{stock.__name__ if stock else 'nothing'}"
            )
            raise ConfigError(f"the model cannot be told by a config: module {name!r} is {what}")


def _attributes(model: nn.Module, plain: nn.Module, ignore: frozenset[str]) -> dict[str, Any]:
    own, found = dict(plain.named_modules()), {}
    for path, module in model.named_modules():
        stock = numbers(own[path])
        for leaf, value in numbers(module).items():
            name = f"{path}.{leaf}" if path else leaf
            if (
                name not in ignore
                and leaf in stock
                and (value != stock[leaf] or type(value) is not type(stock[leaf]))
            ):
                found[name] = list(value) if isinstance(value, tuple) else value
    return found


def _configs(model: nn.Module, plain: nn.Module) -> dict[str, dict[str, Any]]:
    """Numbers in the configs that single modules own, as far as they differ from the one that the
    whole model shares.
    """
    from transformers import PreTrainedConfig

    shared = [
        model.config,
        *(v for v in vars(model.config).values() if isinstance(v, PreTrainedConfig)),
    ]
    own, found = dict(plain.named_modules()), {}
    for path, module in model.named_modules():
        config, stock = vars(module).get("config"), vars(own[path]).get("config")
        if (
            path
            and isinstance(config, PreTrainedConfig)
            and isinstance(stock, PreTrainedConfig)
            and not any(config is s for s in shared)
        ):
            common = next((vars(s) for s in shared if type(s) is type(config)), {})
            changed = {
                k: v
                for k, v in vars(config).items()
                if not k.startswith("_") and _is_number(v) and common.get(k) != v
            }
            if changed := {k: v for k, v in changed.items() if vars(stock).get(k) != v}:
                found[path] = changed
    return found


def run_time_modules(model: nn.Module) -> list[dict[str, Any]]:
    """The modules that no class has: those that pruners inserted, and those that do what removal
    did by hooks. Raises ConfigError for a module of no known kind.
    """
    from prunekit import graph
    from prunekit.checkpoint.remote_code.runtime_modules import describe_modules

    try:
        found = describe_modules(model)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    taken = {entry["path"] for entry in found}
    for path, hooks in graph.edits(model)["arguments"].items():
        for hook in hooks:
            names = (f"{path}.argument_indices_{i}" for i in itertools.count())
            name = next(n for n in names if n not in taken)
            taken.add(name)
            key = int(hook["argument"]) if str(hook["argument"]).isdigit() else hook["argument"]
            numbers = {"argument": key, "axis": hook["dim"]} | {
                k: hook[k] for k in ("size", "keep")
            }
            found.append({"path": name, "kind": "argument_indices", **numbers})
    return found


def _buffers(model: nn.Module, plain: nn.Module) -> dict[str, Any]:
    """Buffers outside the weights whose values a fresh model would not have, after its own
    initialisation.
    """
    materialise(plain, "cpu")
    fresh_values, found = dict(loose_buffers(plain)), {}
    for name, value in loose_buffers(model):
        stock = fresh_values.get(name)
        value = value.detach().cpu()
        if (
            stock is None
        ):  # the class makes none for these layers: Gemma 3 without a layer of full attention
            continue
        if stock.shape == value.shape and stock.dtype == value.dtype and torch.equal(stock, value):
            continue
        if value.numel() > LARGEST_BUFFER:
            raise ConfigError(
                f"the buffer {name} was changed and has {value.numel()} elements; "
                f"{LARGEST_BUFFER} fit into a config"
            )
        dtype = str(value.dtype).removeprefix("torch.")
        found[name] = {
            "shape": list(value.shape),
            "dtype": dtype,
            "values": value.flatten().tolist(),
        }
    return found


def materialise(model: Any, device: torch.device | str) -> None:
    """Give the loose buffers of a model on the meta device their values, the way `from_pretrained`
    does.
    """
    for module in model.modules():
        for leaf in module._non_persistent_buffers_set:
            if (
                module._buffers.get(leaf) is not None
                and module._buffers[leaf].device.type == "meta"
            ):
                module._buffers[leaf] = _unset(module._buffers[leaf], device)
        module.__dict__.pop("_is_hf_initialized", None)
    for tensor in tensors(model).values():
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    model.initialize_weights()


def _unset(like: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A buffer of a value that no initialisation gives, so that one which is never initialised is
    noticed.
    """
    if like.dtype is torch.bool:
        return torch.zeros_like(like, device=device)
    return torch.full_like(
        like, float("nan") if like.is_floating_point() else -(2**15), device=device
    )


def rebuild(model: nn.Module, config: Any, layout: dict[str, Any]) -> nn.Module:
    """The model as a loader would make it: class, config and layout, holding the very tensors of
    `model` (no copy).
    """
    from prunekit.checkpoint.remote_code import modeling_pruned as carry

    kind, config = stock_class(model), copy.deepcopy(config)
    if layout:
        setattr(config, carry.LAYOUT, layout)
        kind = getattr(carry, carry.PREFIX + kind.__name__)
    made: Any = fresh(kind, config)
    made.load_state_dict(model.state_dict(), assign=True, strict=True)
    made.tie_weights()
    materialise(made, next(model.parameters()).device)
    made.generation_config = copy.deepcopy(model.generation_config)
    return made.train(model.training)
