"""Tiny random models of several architectures: two blocks of 64 channels, drawn so that every
sub-layer adds something comparable to what is there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

SIZES: dict[str, Any] = dict(
    vocab_size=128,
    hidden_size=64,
    num_attention_heads=4,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
GROUPED: dict[str, Any] = dict(intermediate_size=96, num_key_value_heads=2, head_dim=16)
"""Of the architectures whose key and value heads serve several queries."""
OTHERS: dict[str, dict[str, Any]] = {
    "bloom": {},
    "gpt2": dict(n_inner=96),
    "gpt_neox": dict(intermediate_size=96),
    "mixtral": GROUPED | dict(num_local_experts=4, num_experts_per_tok=2),
    "mpt": dict(max_seq_len=256),
    "opt": dict(ffn_dim=96, word_embed_proj_dim=64),
}


def tiny_model(arch: str, layers: int = 2, *, meta: bool = False, **over: Any) -> nn.Module:
    """A causal LM of transformers' `arch` in evaluation mode; `over` are fields of its config,
    `meta` gives shapes without weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = SIZES | dict(num_hidden_layers=layers) | OTHERS.get(arch, GROUPED) | over
    config = AutoConfig.for_model(arch, **sizes)
    if meta:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config).eval()
    model = AutoModelForCausalLM.from_config(config).float().eval()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            drawn = torch.randn(p.shape, generator=rng)
            if p.dim() < 2:
                p.add_(0.1 * drawn)
            else:
                p.copy_(
                    drawn * max(p.shape[-2:]) ** -0.5
                    if p.dim() > 2
                    else drawn * p.shape[-1] ** -0.5
                )
    return model
