"""The config that a pruned model is written with: stock where transformers' own class builds it,
else with a layout beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from prunekit.architecture.blocks import block_names
from prunekit.checkpoint.class_sizes import edited, nearest_accepted, rows, rows_of_config
from prunekit.checkpoint.config_fit import fit
from prunekit.checkpoint.construction import clean_config, rebuild, stock_class
from prunekit.checkpoint.equality import cache_shapes, logit_gap
from prunekit.checkpoint.layout import difference
from prunekit.checkpoint.per_layer_config import fit_layers, layers_of_config, with_layers
from prunekit.checkpoint.stock_config import builds, mirrored
from prunekit.errors import ConfigError


class Description(NamedTuple):
    """A config, what must be done to the model that it builds ({} where nothing), and the model
    made that way from the same tensors.
    """

    config: Any
    layout: dict[str, Any]
    copy: Any


def describe(model: nn.Module, check: bool = True) -> Description:
    """The plainest config that gives the model back; with `check` its logits on a few tokens are
    the model's to the bit.

    Raises ConfigError for what no config and layout can describe.
    """
    problem = "its class refuses the config"
    for config, layout in candidates(model):
        copy = rebuild(model, config, layout)
        gap = logit_gap(model, copy) if check else 0.0
        if gap == 0.0:
            return Description(config, layout, copy)
        problem = (
            f"it would give other logits (by {gap:.3g}): something outside of the tensors changed "
            "the model"
        )
    raise ConfigError(f"no checkpoint would be this model: {problem}")


def candidates(model: nn.Module) -> Iterator[tuple[Any, dict[str, Any]]]:
    """(config, layout) from the plainest to the most literal."""
    base, kind = clean_config(model.config), stock_class(model)
    if runs_experts_in_a_loop(model):
        base._experts_implementation = "eager"
    if rows_of_config(kind, edited(base)) is not None and builds(model, base):
        yield base, {}
    target, base = rows(model), nearest_accepted(kind, base)
    found = fit(kind, base, target)
    if found.edits and builds(model, found.config):
        yield found.config, {}
    overrides = fit_layers(kind, found.config, target, block_names(model), found.inert)
    for config in _heterogeneous(model, kind, found.config, overrides):
        for ignore, own in (
            (mirrored(model, config), False),
            (mirrored(model, config), True),
            (frozenset[str](), True),
        ):
            yield config, _with_native_layers(base, difference(model, config, ignore, own))
    for config in _heterogeneous(model, kind, base, {}):
        yield config, _with_native_layers(base, difference(model, config))


def runs_experts_in_a_loop(model: nn.Module) -> bool:
    """Whether removal made experts run one by one: their widths suit no grouped kernel, and a
    loader must know.
    """
    return any(
        getattr(getattr(m, "config", None), "_experts_implementation", None) == "eager"
        for m in model.modules()
    )


def _heterogeneous(
    model: nn.Module, kind: type, config: Any, overrides: dict[int, dict[str, Any]]
) -> Iterator[Any]:
    """The config with what differs by layer in `per_layer_config`; readable as a whole too, unless
    its class builds layers from that.
    """
    layers = layers_of_config(config)
    for i, one in overrides.items():
        layers[i] = {**layers.get(i, {}), **one}
    for i, path in enumerate(block_names(model)):
        gone = bypassed(model.get_submodule(path))
        if gone:
            layers.setdefault(i, {})["skip"] = gone
    if layers:
        native = with_layers(kind, config, layers, readable=False)
        if native is not None and builds(model, native):
            yield native
    made = with_layers(kind, config, layers) if layers else edited(config)
    if rows_of_config(kind, made) is not None:
        yield with_expert_widths(model, with_cache_shapes(model, kind, made))


def with_expert_widths(model: nn.Module, config: Any) -> Any:
    """The config with the width of each layer's fused experts as a list, which is how vLLM reads
    what differs by layer; not where its class has one number for all under that name.
    """
    text, layers = config.get_text_config(), layers_of_config(config)
    listed = all(p.dim() < 3 for p in model.parameters())
    if (
        listed
        or has_one_expert_width(text)
        or not any("intermediate_size" in one for one in layers.values())
    ):
        return config
    widths = [
        layers.get(i, {}).get("intermediate_size", text.intermediate_size)
        for i in range(text.num_hidden_layers)
    ]
    return edited(config, moe_intermediate_size=widths)


def has_one_expert_width(text: Any) -> bool:
    """Whether the class has a field `moe_intermediate_size`, which is one number for all layers."""
    return isinstance(getattr(text, "moe_intermediate_size", None), int)


def bypassed(layer: nn.Module) -> list[str]:
    """Names of the sub-layers of a decoder layer that are gone, as transformers' `skip` lists
    them.
    """
    from prunekit.checkpoint.remote_code.runtime_modules import kind_of

    return [name for name, module in layer.named_modules() if kind_of(module) == "bypass"]


def with_cache_shapes(model: nn.Module, kind: type, config: Any) -> Any:
    """The config with the heads of each layer where `per_layer_config` does not give them: static
    caches and serving engines are laid out by it.
    """
    from transformers.configuration_utils import get_head_shapes

    actual = cache_shapes(model)
    text = config.get_text_config()
    if not actual or len(actual) != text.num_hidden_layers:
        return config
    try:
        heads, width = get_head_shapes(text)
    except (AttributeError, TypeError, ZeroDivisionError):
        return config
    layers = layers_of_config(config)
    edits: dict[str, Any] = {}
    for field, given, position in (("num_key_value_heads", heads, 0), ("head_dim", width, 1)):
        true = [shape[position] for shape in actual]
        if (given if isinstance(given, list) else [given] * len(true)) != true:
            edits[field] = true[0]
            for i, value in enumerate(true):
                layers.setdefault(i, {})[field] = value
    queries = query_heads(model, [kv for kv, _ in actual])
    if queries != [getattr(c, "num_attention_heads", None) for c in text.per_layer_config]:
        # Without a size of its own a head would get the hidden size over the number of heads.
        edits["head_dim"] = actual[0][1]
        for i, heads in enumerate(queries):
            layers.setdefault(i, {}).update(num_attention_heads=heads, head_dim=actual[i][1])
    if not edits:
        return config
    edits |= {"per_layer_config": layers, "allow_global_per_layer_attribute_access": True}
    made = edited(config, **edits)
    return made if rows_of_config(kind, made) is not None else config


def query_heads(model: nn.Module, key_heads: list[int]) -> list[int]:
    """Heads of the queries in each layer, which has so many of keys."""
    layers = [model.get_submodule(path) for path in block_names(model)]
    groups = [
        next((g for m in layer.modules() if (g := vars(m).get("num_key_value_groups"))), 1)
        for layer in layers
    ]
    return [heads * each for heads, each in zip(key_heads, groups)]


def _with_native_layers(base: Any, layout: dict[str, Any]) -> dict[str, Any]:
    """The layout, with the `per_layer_config` that the dense model had of its own."""
    native = base.get_text_config().to_dict().get("per_layer_config")
    return {**layout, "native": native} if native and layout else layout
