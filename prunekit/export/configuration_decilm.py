"""The config of an uneven Llama in the form of DeciLM: sizes of each layer in `block_configs`.

Written by prunekit beside the weights; imports nothing of prunekit. Engines read the entries of
`block_configs` as attributes.
"""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig


class Block(dict[str, Any]):
    """A mapping whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DeciLMConfig(LlamaConfig):
    """`block_configs`: for each layer `attention` (no_op, n_heads_in_group: query heads on a
    key/value head) and `ffn` (no_op, ffn_mult, intermediate_size, hidden_act).
    """

    model_type = "nemotron-nas"
    block_configs: Any = None

    def __init__(self, block_configs: list[dict[str, Any]] | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.block_configs = [
            Block({half: Block(sizes) for half, sizes in one.items()})
            for one in block_configs or []
        ]
