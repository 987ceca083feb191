"""What a GGUF file holds besides the tokenizer: an architecture, facts, tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import ConfigError

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: its name there, its shape, and how to get it in float32."""

    name: str
    shape: tuple[int, ...]
    get: Callable[[], Tensor]


@dataclass(frozen=True)
class Content:
    """`facts` are what `GGUFWriter.add_<name>` takes: a number, or one for each layer."""

    arch: str
    facts: dict[str, Any]
    entries: list[Entry]


def entry(name: str, tensor: Tensor, *changes: Change) -> Entry:
    """An entry that holds `tensor` after `changes`, which are made when it is asked for."""

    def get() -> Tensor:
        t = tensor.detach().cpu().float()
        for change in changes:
            t = change(t)
        return t.contiguous()

    meta: Tensor = tensor.detach().to("meta")
    for change in changes:
        meta = change(meta)
    return Entry(name, tuple(meta.shape), get)


def neighbours(heads: int) -> Change:
    """Rows `(heads * width, ...)` for an engine that pairs neighbouring channels for rotary
    embedding, where transformers pairs the two halves of a head.
    """

    def change(t: Tensor) -> Tensor:
        halves = t.reshape(heads, 2, t.shape[0] // heads // 2, *t.shape[1:])
        return halves.transpose(1, 2).reshape(t.shape)

    return change


def grouped(heads: int) -> Change:
    """Rows of a fused matrix that go head by head (query, key, value of each) into all queries, all
    keys, all values.
    """

    def change(t: Tensor) -> Tensor:
        each = t.reshape(heads, 3, t.shape[0] // heads // 3, *t.shape[1:])
        return each.transpose(0, 1).reshape(t.shape)

    return change


def plus_one(t: Tensor) -> Tensor:
    """The gain of a norm that adds one to its weight."""
    return t + 1


def transposed(t: Tensor) -> Tensor:
    """The weight of a Conv1D as that of a linear module."""
    return t.T


def own_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the state dict, those that are tied once."""
    own = {name for name, _ in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - own
    for name, tensor in model.state_dict().items():
        if name not in tied:
            yield name, tensor


@cache
def names_of(arch: str, layers: int) -> Callable[[str], str]:
    """The name that GGUF has for a tensor of transformers. The function raises ConfigError where it
    has none.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    names = get_tensor_name_map(next(k for k, v in MODEL_ARCH_NAMES.items() if v == arch), layers)

    def name(tensor: str) -> str:
        stem, _, leaf = tensor.rpartition(".")
        found = names.get_name(stem)
        if found is None:
            raise ConfigError(
                f"GGUF has no name for the tensor {tensor} in the architecture {arch}"
            )
        return f"{found}.{leaf}"

    return name


def rotated(model: Any) -> int:
    """Channels of a head that the model turns, by its own frequencies: not every class of
    transformers reads `partial_rotary_factor`.
    """
    return 2 * int(model.get_decoder().rotary_emb.inv_freq.numel())


def whole_heads(model: Any, width: int) -> None:
    """Raises ConfigError where a head is turned in part: channels are paired over all of it."""
    if rotated(model) != width:
        raise ConfigError(
            f"llama.cpp: {rotated(model)} of {width} channels of a head are rotated; with sizes "
            f"by layer, or for a {model.config.model_type}, all of them must be"
        )


def rope_factors(model: Any, width: int) -> list[Entry]:
    """By how much each rotary frequency is divided, where some is: how GGUF tells of scaling."""
    config = model.config
    frequencies = model.get_decoder().rotary_emb.inv_freq.detach().cpu().double()
    plain = config.rope_parameters["rope_theta"] ** -(
        torch.arange(0, width, 2, dtype=torch.float64) / width
    )
    if torch.allclose(frequencies, plain, rtol=1e-5):
        return []
    return [entry("rope_freqs.weight", plain / frequencies)]
