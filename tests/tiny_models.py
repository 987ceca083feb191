"""Tiny random models of many architectures: two blocks, every size another number, drawn so that
each sub-layer adds something comparable to what is there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

VOCAB = 128


@dataclass(frozen=True)
class Sizes:
    """What a call asks for: numbers of channels, neurons, heads and blocks."""

    hidden: int
    ffn: int
    heads: int
    kv: int
    head_dim: int
    layers: int

    @property
    def expert(self) -> int:
        """Neurons of an expert where dense blocks have other ones."""
        return self.ffn // 3


def usual(s: Sizes) -> dict[str, Any]:
    """Fields by the names that most configs give them; a config takes those that it has."""
    experts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return dict.fromkeys(experts, 5) | {
        "vocab_size": VOCAB,
        "hidden_size": s.hidden,
        "intermediate_size": s.ffn,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv,
        "head_dim": s.head_dim,
        "num_hidden_layers": s.layers,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "moe_intermediate_size": s.expert,
        "shared_expert_intermediate_size": s.ffn,
        "num_experts_per_tok": 2,
    }


def latent(s: Sizes) -> dict[str, Any]:
    """Latent attention: its ranks and the parts of its heads."""
    ranks = {"kv_lora_rank": 26, "q_lora_rank": 34}
    parts = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 6, "v_head_dim": 10, "head_dim": 6}
    return ranks | parts | {"num_key_value_heads": s.heads, "n_group": 1, "topk_group": 1}


def inner(s: Sizes) -> dict[str, Any]:
    """GPT-2 and its kin."""
    return {"n_inner": s.ffn}


OWN: dict[str, Callable[[Sizes], dict[str, Any]]] = {
    "bamba": lambda s: {
        "attn_layer_indices": [1],
        "mamba_n_heads": 8,
        "mamba_d_head": s.hidden // 4,
        "mamba_d_state": 14,
        "mamba_chunk_size": 16,
    },
    "beam": lambda s: {
        "mlp_layer_types": ["dense", "sparse"] * (s.layers // 2),
        "n_group": 1,
        "topk_group": 1,
    },
    "codegen": lambda s: inner(s) | {"rotary_dim": 6, "n_ctx": 256},
    "cpmant": lambda s: {"dim_head": s.head_dim, "dim_ff": s.ffn, "prompt_length": 4},
    "dbrx": lambda s: {
        "attn_config": {"kv_n_heads": s.kv, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {
            "hidden_size": s.hidden,
            "ffn_hidden_size": s.ffn,
            "moe_num_experts": 5,
            "moe_top_k": 2,
        },
    },
    "deepseek_v3": lambda s: (
        latent(s) | {"first_k_dense_replace": 1, "num_nextn_predict_layers": 0}
    ),
    "falcon": lambda s: {"num_kv_heads": s.kv, "ffn_hidden_size": s.ffn},
    "gpt2": inner,
    "gpt_bigcode": inner,
    "gptj": lambda s: inner(s) | {"rotary_dim": 6},
    "inkling2_text": lambda s: {
        "unpadded_vocab_size": VOCAB,
        "swa_num_attention_heads": s.heads,
        "swa_num_key_value_heads": s.kv,
        "swa_head_dim": s.head_dim,
        "sliding_window_size": 44,
        "rel_extent": 36,
        "d_rel": 10,
    },
    "llama4_text": lambda s: {
        "moe_layers": [1],
        "no_rope_layers": [1, 0] * (s.layers // 2),
        "intermediate_size_mlp": s.ffn,
        "intermediate_size": s.expert,
    },
    "longcat_flash": lambda s: latent(s) | {"num_layers": s.layers, "zero_expert_num": 3},
    "mamba": lambda s: {"intermediate_size": 2 * s.hidden, "state_size": 14, "time_step_rank": 6},
    "mamba2": lambda s: {
        "num_heads": 8,
        "head_dim": s.hidden // 4,
        "state_size": 14,
        "n_groups": 1,
        "chunk_size": 16,
    },
    "minicpm3": latent,
    "mpt": lambda s: {"max_seq_len": 256},
    "opt": lambda s: {"ffn_dim": s.ffn, "word_embed_proj_dim": s.hidden},
    "rembert": lambda s: {
        "input_embedding_size": s.hidden + 4,
        "output_embedding_size": s.hidden + 8,
        "is_decoder": True,
    },
    "xlnet": lambda s: {"d_inner": s.ffn, "d_head": s.hidden // s.heads},
    "zaya": lambda s: {"num_experts_per_tok": 1, "router_hidden_size": 18},
}
"""Fields of one architecture alone, or of its own meaning."""


def tiny_model(
    arch: str,
    layers: int = 2,
    *,
    hidden: int = 64,
    ffn: int = 96,
    heads: int = 4,
    kv: int = 2,
    head_dim: int = 20,
    meta: bool = False,
    **fields: Any,
) -> nn.Module:
    """A causal LM of transformers' `arch` in evaluation mode; `fields` are of its config.

    `head_dim` serves where a config has it: elsewhere it is hidden / heads. `meta` gives shapes
    without weights.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    sizes = Sizes(hidden, ffn, heads, kv, head_dim, layers)
    kind = CONFIG_MAPPING[arch]
    own_name, has = kind.attribute_map, kind().to_dict()
    named = {own_name.get(k, k): v for k, v in usual(sizes).items()}
    chosen = {k: v for k, v in named.items() if k in has}
    own = OWN.get(arch, lambda s: {})(sizes)
    config = kind(**chosen | own | fields)
    if meta:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config).eval()
    model = AutoModelForCausalLM.from_config(config).float().eval()
    draw(model)
    return model


@torch.no_grad()
def draw(model: nn.Module) -> None:
    """Matrices that keep the size of what they read; vectors moved off their special values."""
    rng = torch.Generator().manual_seed(0)
    for p in model.parameters():
        noise: Tensor = torch.randn(p.shape, generator=rng)
        if p.dim() < 2:
            p.add_(0.1 * noise)
        else:
            p.copy_(noise * (max(p.shape[-2:]) if p.dim() > 2 else p.shape[-1]) ** -0.5)


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """(N, T, V) of what a model says of tokens (N, T), without a cache."""
    found: Tensor = model(tokens, use_cache=False).logits
    return found
