"""The config that a pruned model is written with: stock where transformers' own class builds it,
else with a layout beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from prunekit.checkpoint.config_fit import (
    REFUSALS,
    acceptable,
    built,
    edited,
    fit,
    fit_layers,
    layer_paths,
    mirrored,
    plain,
    rows,
    with_layers,
)
from prunekit.checkpoint.layout import clean_config, difference, rebuild, stock_class
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

    Raises ConfigError for what no config and layout can tell.
    """
    problems: list[str] = []
    for config, layout in candidates(model):
        copy = rebuild(model, config, layout)
        gap = logit_gap(model, copy) if check else 0.0
        if gap == 0.0:
            return Description(config, layout, copy)
        problems.append(
            f"it would give other logits (by {gap:.3g}): something outside of the tensors changed "
            "the model"
        )
    raise ConfigError(
        "no checkpoint would be this model: "
        f"{problems[-1] if problems else 'its class refuses the config'}"
    )


def candidates(model: nn.Module) -> Iterator[tuple[Any, dict[str, Any]]]:
    """(config, layout) from the plainest to the most literal."""
    base, kind = clean_config(model.config), stock_class(model)
    if plain_experts(model):
        base._experts_implementation = "eager"
    if built(kind, edited(base)) is not None and plain(model, base):
        yield base, {}
    target, base = rows(model), acceptable(kind, base)
    found = fit(kind, base, target)
    if found.edits and plain(model, found.config):
        yield found.config, {}
    overrides = fit_layers(kind, found.config, target, layer_paths(model), found.inert)
    for config in _heterogeneous(model, kind, found.config, overrides):
        for ignore, own in (
            (mirrored(model, config), False),
            (mirrored(model, config), True),
            (frozenset[str](), True),
        ):
            yield config, _remember(base, difference(model, config, ignore, own))
    for config in _heterogeneous(model, kind, base, {}):
        yield config, _remember(base, difference(model, config))


def plain_experts(model: nn.Module) -> bool:
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
    from prunekit.checkpoint.remote_code.runtime_modules import kind_of

    given = config.get_text_config().to_dict().get("per_layer_config") or {}
    layers = {int(i): dict(one) for i, one in given.items()}
    for i, one in overrides.items():
        layers[i] = {**layers.get(i, {}), **one}
    for i, path in enumerate(layer_paths(model)):
        gone = [n for n, m in model.get_submodule(path).named_modules() if kind_of(m) == "bypass"]
        if gone:
            layers.setdefault(i, {})["skip"] = gone
    if layers:
        native = with_layers(
            config, layers, lambda made: built(kind, made) is not None, readable=False
        )
        if native is not None and plain(model, native):
            yield native
    made = (
        with_layers(config, layers, lambda made: built(kind, made) is not None)
        if layers
        else edited(config)
    )
    if made is not None and built(kind, made) is not None:
        yield with_cache_shapes(model, kind, made)


def with_cache_shapes(model: nn.Module, kind: type, config: Any) -> Any:
    """The config with the heads of each layer's cache where `per_layer_config` does not tell them:
    static caches are laid out by it.
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
    layers = {
        int(i): dict(one) for i, one in (text.to_dict().get("per_layer_config") or {}).items()
    }
    edits: dict[str, Any] = {}
    for field, told, seen in (("num_key_value_heads", heads, 0), ("head_dim", width, 1)):
        true = [shape[seen] for shape in actual]
        if (told if isinstance(told, list) else [told] * len(true)) != true:
            edits[field] = true[0]
            for i, value in enumerate(true):
                layers.setdefault(i, {})[field] = value
    if not edits:
        return config
    edits |= {"per_layer_config": layers, "allow_global_per_layer_attribute_access": True}
    made = edited(config, **edits)
    return made if built(kind, made) is not None else config


@torch.no_grad()
def cache_shapes(model: Any) -> list[tuple[int, int]]:
    """(heads, head size) of each layer's keys, seen by running a few tokens; [] where layers keep
    something else, on meta, or where it fails.
    """
    device = next(model.parameters()).device
    if device.type == "meta":
        return []
    was = model.training
    try:
        output = model.eval()(input_ids=torch.arange(4, device=device)[None], use_cache=True)
    except REFUSALS:  # where it cannot run at all `logit_gap` says why
        return []
    finally:
        model.train(was)
    layers = getattr(getattr(output, "past_key_values", None), "layers", [])
    keys: list[Any] = [getattr(layer, "keys", None) for layer in layers]
    if not all(isinstance(k, torch.Tensor) and k.dim() == 4 for k in keys):
        return []
    return [(k.shape[1], k.shape[3]) for k in keys]


def _remember(base: Any, layout: dict[str, Any]) -> dict[str, Any]:
    """The layout, with the `per_layer_config` that the dense model had of its own."""
    native = base.get_text_config().to_dict().get("per_layer_config")
    return {**layout, "native": native} if native and layout else layout


@torch.no_grad()
def logit_gap(model: Any, copy: nn.Module) -> float:
    """Largest difference between the logits of two models on eight tokens; 0 on the meta device,
    infinite where only `copy` cannot run.

    Raises ConfigError where the model itself cannot: expert widths, for one, that its matrix kernel
    does not take.
    """
    device = next(model.parameters()).device
    if device.type == "meta":
        return 0.0
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(8, device=device) * 7919 % vocabulary)[None]
    was = model.training
    try:
        ours = model.eval()(input_ids=ids, use_cache=False).logits.float().nan_to_num()
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            "the model cannot run, so its checkpoint cannot be checked (check=False saves it all "
            f"the same): {error}"
        ) from error
    finally:
        model.train(was)
    try:
        theirs = copy.eval()(input_ids=ids, use_cache=False).logits.float().nan_to_num()
    except REFUSALS:
        return float("inf")
    finally:
        copy.train(was)
    return (ours - theirs).abs().max().item() if ours.shape == theirs.shape else float("inf")
