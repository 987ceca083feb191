"""What a pruned model is, described as the difference from a new model of its own class: run-time
modules, shapes, numbers, configs, buffers.

The difference is measured, not remembered, so whatever changed the model in memory (any pruner, any
number of times) is caught.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

from prunekit.checkpoint.construction import build_on_meta, initialise_buffers, stock_class
from prunekit.checkpoint.state import is_number, non_persistent_buffers, numbers, tensors
from prunekit.errors import ConfigError

LARGEST_BUFFER = 1 << 16
"""A buffer outside the weights is written into config.json; more elements than this are refused."""


def difference(
    model: nn.Module, config: Any, ignore: frozenset[str] = frozenset(), own_configs: bool = True
) -> dict[str, Any]:
    """The layout: what must be done to a new model of `config` to make it the shape of `model`;
    {} where nothing must.

    `ignore` names attributes for which the new model's value is taken; without `own_configs` all
    modules read the shared config. Raises ConfigError where the two differ in something that a
    layout cannot describe.
    """
    from prunekit.checkpoint.remote_code import modeling_pruned
    from prunekit.checkpoint.remote_code.runtime_modules import build_modules

    reference = build_on_meta(stock_class(model), config)
    layout: dict[str, Any] = {"modules": describe_runtime_modules(model)}
    with torch.device("meta"):
        build_modules(reference, layout["modules"])
    _compare_classes(model, reference, {entry["path"] for entry in layout["modules"]})
    ours, theirs = tensors(model), tensors(reference)
    layout["absent"] = sorted(n for n in theirs if n not in ours)
    layout["shapes"] = {
        n: "x".join(map(str, t.shape))
        for n, t in ours.items()
        if n not in theirs or t.shape != theirs[n].shape
    }
    modeling_pruned.build(reference, {k: layout[k] for k in ("absent", "shapes")})
    layout["attributes"] = _attributes(model, reference, ignore)
    layout["configs"] = _configs(model, reference) if own_configs else {}
    modeling_pruned.build(reference, {k: layout[k] for k in ("attributes", "configs")})
    layout["buffers"] = _buffers(model, reference)
    return {k: v for k, v in layout.items() if v}


def describe_runtime_modules(model: nn.Module) -> list[dict[str, Any]]:
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
            where = {"argument": hook["argument"], "axis": hook["dim"], "size": hook["size"]}
            entry = {"path": name, "kind": "argument_indices", **where, "keep": hook["keep"]}
            found.append(entry)
    return found


def _compare_classes(model: nn.Module, reference: nn.Module, added: set[str]) -> None:
    """Raises ConfigError naming a module that is of another class than in `reference`; `added` are
    those that a loader builds by itself.
    """
    ours = {n: type(m).__name__ for n, m in model.named_modules() if n and n not in added}
    theirs = {n: type(m).__name__ for n, m in reference.named_modules() if n and n not in added}
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise ConfigError(
                f"no config describes the model: module {name!r} is {ours.get(name, 'missing')}, "
                f"where its config builds {theirs.get(name, 'nothing')}"
            )


def _attributes(model: nn.Module, reference: nn.Module, ignore: frozenset[str]) -> dict[str, Any]:
    """Numbers of modules that are not those of the new model."""
    own, found = dict(reference.named_modules()), {}
    for path, module in model.named_modules():
        stock = numbers(own[path])
        for leaf, value in numbers(module).items():
            name = f"{path}.{leaf}" if path else leaf
            if name in ignore or leaf not in stock:
                continue
            if value != stock[leaf] or type(value) is not type(stock[leaf]):
                found[name] = list(value) if isinstance(value, tuple) else value
    return found


def _configs(model: nn.Module, reference: nn.Module) -> dict[str, dict[str, Any]]:
    """Numbers in the configs that single modules own, as far as they differ from the one that the
    whole model shares.
    """
    from transformers import PreTrainedConfig

    whole: Any = model.config
    shared = [whole, *(v for v in vars(whole).values() if isinstance(v, PreTrainedConfig))]
    own, found = dict(reference.named_modules()), {}
    for path, module in model.named_modules():
        config, stock = vars(module).get("config"), vars(own[path]).get("config")
        if not path or any(config is s for s in shared):
            continue
        if not isinstance(config, PreTrainedConfig) or not isinstance(stock, PreTrainedConfig):
            continue
        common = next((vars(s) for s in shared if type(s) is type(config)), {})
        changed = {
            k: v
            for k, v in vars(config).items()
            if not k.startswith("_")
            and is_number(v)
            and common.get(k) != v
            and vars(stock).get(k) != v
        }
        if changed:
            found[path] = changed
    return found


def _buffers(model: nn.Module, reference: nn.Module) -> dict[str, Any]:
    """Buffers outside the weights whose values a new model would not have, after its own
    initialisation.
    """
    initialise_buffers(reference, "cpu")
    initial, found = dict(non_persistent_buffers(reference)), {}
    for name, value in non_persistent_buffers(model):
        stock, value = initial.get(name), value.detach().cpu()
        # The class makes none for these layers: Gemma 3 without a layer of full attention.
        if stock is None:
            continue
        if stock.shape == value.shape and stock.dtype == value.dtype and torch.equal(stock, value):
            continue
        if value.numel() > LARGEST_BUFFER:
            raise ConfigError(
                f"the buffer {name} was changed and has {value.numel()} elements; "
                f"{LARGEST_BUFFER} fit into a config"
            )
        found[name] = {
            "shape": list(value.shape),
            "dtype": str(value.dtype).removeprefix("torch."),
            "values": value.flatten().tolist(),
        }
    return found
