"""What removing units saves of a budget, and what the whole model takes of it: parameters, memory,
the cache of keys and values, multiply-accumulates. Milliseconds are in `latency`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field
from torch import nn

from prunekit import graph
from prunekit.architecture.macs import macs
from prunekit.architecture.mapped import release
from prunekit.architecture.sizes import Sizes
from prunekit.architecture.timing import prompt_ids
from prunekit.errors import ConfigError
from prunekit.selection.levels import Price
from prunekit.types import Group, tensor_of

Budgeted = Literal["prunable", "model", "memory_mib", "kv_cache", "macs", "latency_ms"]
"""Of what a share goes: the parameters that may go, all parameters, MiB of weights, MiB of keys and
values, multiply-accumulates of the prompt, milliseconds of the request.
"""
MIB = 2**20
REQUEST = {"batch": 1, "prompt": 128, "new_tokens": 16, "repeats": 3}


def whole_request(given: dict[str, int]) -> dict[str, int]:
    """What is given, with the defaults of the rest. Raises ValueError for an unknown key, and for
    nothing to read.
    """
    if unknown := given.keys() - REQUEST.keys():
        raise ValueError(f"no {min(unknown)!r}; possible: {', '.join(REQUEST)}")
    request = REQUEST | given
    if empty := [key for key, n in request.items() if not n and key != "new_tokens"]:
        raise ValueError(f"{empty[0]} must be greater than 0")
    return request


Request = Annotated[dict[str, Annotated[int, Field(ge=0)]], AfterValidator(whole_request)]
"""What the model is asked for where that decides what it takes: `batch` sequences of `prompt`
tokens are read, `new_tokens` are written; times are medians over `repeats`.
"""


@dataclass(frozen=True)
class Prices:
    """A budget's unit on one model.

    Attributes:
        dense: what the dense model takes.
        saves: by group, what removing so many of its units saves; that of several groups adds up.
        measure: what a model takes, so that the outcome can be told beside the prediction.
    """

    dense: float
    saves: Mapping[str, Price]
    measure: Callable[[nn.Module], float]

    def saved(self, counts: Mapping[str, int]) -> float:
        """By so many units of each group."""
        return sum(self.saves[name](n) for name, n in counts.items())


def linear(per_unit: float) -> Price:
    """Every unit saves the same."""
    return lambda n: per_unit * n


def parameter_prices(model: nn.Module, groups: list[Group], of: str) -> Prices:
    """In parameters: `model` counts all, `prunable` those that belong to units. Of matrices whose
    elements are the units, zeros count as gone.
    """
    sizes = Sizes(model, groups)
    outside = 0 if of == "model" else sizes.total - sizes.prunable()
    matrices = [g.matrix for g in groups if g.kind == "weights"]

    def measure(pruned: nn.Module) -> float:
        found = [tensor_of(pruned, name) for name in matrices]
        zeros = sum(W.numel() - int(W.count_nonzero()) for W in found)
        release(found)
        return float(sum(p.numel() for p in pruned.parameters()) - outside - zeros)

    saves = {g.name: linear(sizes.removed({g.name: 1})) for g in groups}
    return Prices(float(sizes.total - outside), saves, measure)


def memory_prices(model: nn.Module, groups: list[Group]) -> Prices:
    """In MiB of parameters and buffers; tensors that share a storage count once."""

    def taken(of: nn.Module) -> float:
        found = {
            t.untyped_storage().data_ptr() if not t.is_meta else id(t): t.untyped_storage().nbytes()
            for t in chain(of.parameters(), of.buffers())
        }
        return sum(found.values()) / MIB

    sizes = Sizes(model, groups)
    saves = {
        g.name: linear(
            sizes.removed({g.name: 1}) * tensor_of(model, g.members[0].param).element_size() / MIB
        )
        for g in groups
    }
    return Prices(taken(model), saves, taken)


def shape_key(model: nn.Module, group: Group) -> str:
    """Alike for groups that take the same of everything."""
    shapes = [(tuple(tensor_of(model, m.param).shape), m.axis, m.width) for m in group.members]
    return f"{group.kind} {group.units} {shapes}"


def macs_prices(model: nn.Module, groups: list[Group], request: Mapping[str, int]) -> Prices:
    """In multiply-accumulates of the prompt, by LLM-Pruner's rules; attention and feed-forward are
    linear in their units.
    """
    tokens = request["prompt"]

    def taken(of: nn.Module) -> float:
        return float(request["batch"] * macs(of, tokens))

    dense, known = taken(model), {}
    for g in groups:
        key = shape_key(model, g)
        if key not in known and g.units > 1:
            shapes = copy.deepcopy(model).to("meta")
            graph.remove(shapes, {g.name: torch.arange(g.units) == 0})
            known[key] = (dense - taken(shapes)) / (g.units - 1)
    saves = {g.name: linear(known.get(shape_key(model, g), 0.0)) for g in groups}
    return Prices(dense, saves, taken)


def kv_prices(model: nn.Module, groups: list[Group], request: Mapping[str, int]) -> Prices:
    """In MiB of the keys and values that the request leaves in the cache. Raises ConfigError where
    they do not become fewer with the heads (latent attention).
    """
    tokens = request["prompt"] + request["new_tokens"]

    def by_layer(of: nn.Module) -> list[tuple[int, float]]:
        """Heads, and MiB, of each layer's cache."""
        with torch.no_grad():
            out: Any = of(input_ids=prompt_ids(of, 1, 2), use_cache=True)
        found = []
        for layer in getattr(out.past_key_values, "layers", []):
            keys = getattr(layer, "keys", None)
            if keys is None:
                found.append((0, 0.0))
                continue
            # transformers keeps one token less than a sliding window, for the next one to come.
            held = min(tokens, getattr(layer, "sliding_window", tokens + 1) - 1)
            one = sum(t.numel() * t.element_size() for t in (keys, layer.values)) / keys.shape[-2]
            found.append((keys.shape[1], request["batch"] * held * one / MIB))
        return found

    layers = by_layer(model)
    saves: dict[str, Price] = {}
    for g in groups:
        heads, size = layers[g.layer or 0] if (g.layer or 0) < len(layers) else (0, 0.0)
        if g.kind == "heads" and heads != g.units:
            raise ConfigError(
                f"ratio.of=kv_cache: the cache of layer {g.layer} has {heads} heads and "
                f"{g.name} {g.units}: it does not shrink with them"
            )
        saves[g.name] = linear(size / g.units if g.kind == "heads" else 0.0)

    def taken(of: nn.Module) -> float:
        return sum(size for _, size in by_layer(of))

    return Prices(sum(size for _, size in layers), saves, taken)
