"""Models of the Llama kind whose heads and widths differ by layer, as the architecture `deci`.

It is the one architecture of llama.cpp whose graph reads heads and feed-forward widths from an
array, one value a layer; no heads mean no attention. Biases of all seven matrices are optional.
"""

from __future__ import annotations

import re
from typing import Any

from prunekit.checkpoint.block_configs import LIKE_LLAMA
from prunekit.checkpoint.construction import clean_config
from prunekit.checkpoint.state import tensors
from prunekit.errors import ConfigError
from prunekit.export.gguf_content import (
    Change,
    Content,
    Entry,
    entry,
    names_of,
    neighbours,
    own_tensors,
    rope_factors,
    whole_heads,
)
from prunekit.export.gguf_families import FAMILIES, check_fields, facts_of, head_sizes
from prunekit.export.llama_like import check_difference, empty_attention, empty_ffn, split_fused

ARCH = "deci"
EMPTY_FFN = 32
"""Neurons, all zero, of a layer whose feed-forward is gone: with none the engine would drop the
layer's attention as well. 32, so that every type can store them.
"""
EMPTY_HEADS = 1
"""Query and key/value heads, all zero, of a first layer whose attention is gone: without heads
there the engine takes the head size for 0 everywhere.
"""
LAYER = re.compile(r"model\.layers\.\d+\.")


def uneven_content(model: Any) -> Content:
    """The content for a Llama-like model with widths of its own in each layer. Raises ConfigError
    naming what the engine would compute differently.
    """
    config, kind = clean_config(model.config), model.config.model_type
    if kind not in LIKE_LLAMA:
        raise ConfigError(
            f"llama.cpp takes other widths in each layer of {', '.join(LIKE_LLAMA)}, not of "
            f"{kind}. Possible: prune with ratio.loadable=stock"
        )
    check_fields(config, FAMILIES[kind])
    check_difference(model, config, "llama.cpp")
    head_dim = head_sizes(config)[2]
    whole_heads(model, head_dim)
    layers = [
        Layer(model, i, head_dim, config.hidden_size) for i in range(config.num_hidden_layers)
    ]
    facts = facts_of(model, config, FAMILIES[kind]) | {
        "head_count": [layer.heads for layer in layers],
        "head_count_kv": [layer.pairs for layer in layers],
        "feed_forward_length": [layer.width for layer in layers],
    }
    named = names_of(ARCH, len(layers))
    entries = [
        entry(named(name), tensor)
        for name, tensor in own_tensors(model)
        if LAYER.match(name) is None
    ]
    for layer in layers:
        entries += layer.entries()
    return Content(ARCH, facts, entries + rope_factors(model, head_dim))


class Layer:
    """Sizes and tensors of one layer. A half that is gone is there as zeros where the engine cannot
    do without it, else `heads` and `pairs` (key/value heads) are 0.
    """

    def __init__(self, model: Any, index: int, head_dim: int, hidden: int):
        self.index = index
        stem = f"model.layers.{index}."
        found = {n: t for n, t in tensors(model).items() if n.startswith(stem)}
        self.own = split_fused({n.removeprefix(stem): t for n, t in found.items()})
        if "self_attn.q_proj.weight" not in self.own:
            self.own.pop("input_layernorm.weight", None)
            if index == 0:
                self.own |= empty_attention(EMPTY_HEADS * head_dim, hidden)
        if "mlp.gate_proj.weight" not in self.own:
            self.own |= empty_ffn(EMPTY_FFN, hidden)
        self.heads = self._rows("self_attn.q_proj") // head_dim
        self.pairs = self._rows("self_attn.k_proj") // head_dim
        self.width = self._rows("mlp.gate_proj")
        groups = getattr(model.get_submodule(f"{stem}self_attn"), "num_key_value_groups", 1)
        if self.pairs and (self.heads % self.pairs or groups != self.heads // self.pairs):
            raise ConfigError(
                f"llama.cpp: layer {index} has {self.heads} query heads on {self.pairs} key/value "
                "heads; it asks for a multiple. Possible: prune whole groups of heads"
            )

    def _rows(self, stem: str) -> int:
        weight = self.own.get(f"{stem}.weight")
        return 0 if weight is None else int(weight.shape[0])

    def entries(self) -> list[Entry]:
        """The tensors that the engine asks for."""
        named = names_of(ARCH, self.index + 1)
        found = []
        for name, tensor in self.own.items():
            changes: list[Change] = []
            if "q_proj" in name or "k_proj" in name:
                changes = [neighbours(self.heads if "q_proj" in name else self.pairs)]
            found.append(entry(named(f"model.layers.{self.index}.{name}"), tensor, *changes))
        return found
