"""Generation with a cache is part of the proof, and a block's number is no size, whatever it
equals.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from foreign import FOREIGN
from torch import nn

from prunekit.graph import discover, edits, remove, report
from prunekit.graph.discovery import discovery
from prunekit.graph.generation_check import cache_difference
from prunekit.graph.sample_run import inputs_for
from prunekit.graph.small_model import randomised

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 60,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "vocab_size": 128,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def build(config: str, **sizes: Any) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, config)(**{**SIZES, **TOKENS, **sizes})
    )
    return randomised(model.eval())


@pytest.mark.parametrize(("kv", "layers"), [(2, 3), (3, 4)])
def test_a_blocks_number_does_not_follow_heads_that_equal_it(kv: int, layers: int) -> None:
    """A model of few blocks is its own small version: block 2 of one with 2 kv heads has
    `layer_idx` 2, and a cache that is kept under it.
    """
    model = build("Gemma2Config", num_key_value_heads=kv, head_dim=8, num_hidden_layers=layers)
    remove(model, {f"heads.{i}": torch.arange(kv) != i % kv for i in range(layers)})
    assert [block.self_attn.layer_idx for block in model.model.layers] == list(range(layers))
    assert not any("layer_idx" in values for values in edits(model)["attributes"].values())
    assert cache_difference(model, inputs_for(model)) is None


def test_blocks_of_a_hybrid_are_renumbered_wherever_they_keep_their_number() -> None:
    sizes = {
        "num_key_value_heads": 3,
        "mamba_d_head": 16,
        "mamba_n_heads": 6,
        "mamba_n_groups": 1,
        "mamba_d_state": 8,
        "mamba_chunk_size": 16,
    }
    model = build("BambaConfig", attn_layer_indices=[1], **sizes)
    remove(model, {"blocks": torch.tensor([False, True, True])})
    numbers = [
        m.layer_idx
        for block in model.model.layers
        for m in block.modules()
        if hasattr(m, "layer_idx")
    ]
    assert numbers == [0, 1]
    assert cache_difference(model, inputs_for(model)) is None


def test_what_breaks_the_cache_is_left_alone_with_that_reason() -> None:
    """RWKV makes its states, which hold residual and attention channels, all of one size."""
    sizes = {
        k: v for k, v in SIZES.items() if k not in ("num_attention_heads", "num_hidden_layers")
    }
    model = build("RwkvConfig", **sizes, attention_hidden_size=48, num_hidden_layers=2)
    groups = discover(model)
    assert {g.kind for g in groups} == {"neurons"}
    assert any(line.startswith("hidden: ") and "with a cache" in line for line in report(model))
    kept = {g.name: torch.arange(g.units) % 3 > 0 for g in groups}
    assert cache_difference(remove(copy.deepcopy(model), kept), inputs_for(model)) is None


def test_a_model_that_cannot_generate_is_proven_without_and_says_so(llama: nn.Module) -> None:
    assert discovery(llama).uncached is None
    assert discovery(randomised(FOREIGN["nanogpt"]().eval())).uncached == "it has no `generate`"


class Noisy(nn.Module):
    """Two residual blocks and noise."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(64, 24), nn.Linear(24, 64)
        self.blocks = nn.ModuleList(nn.Linear(24, 24) for _ in range(2))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x + torch.randn_like(x))


def test_a_model_with_random_outputs_is_left_alone() -> None:
    model = Noisy()
    assert discover(model) == []
    assert any(line.startswith("hidden: two runs") for line in report(model))
