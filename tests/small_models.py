"""Small random models of the architectures that pruning of single weights is tried on: all sizes
apart, and all divisible by 4.
"""

from __future__ import annotations

import torch
from torch import nn


def small_model(name: str, layers: int = 2) -> nn.Module:
    """`llama` (grouped queries, gated FFN), `gpt2` (Conv1D, fused q, k and v), `opt` (biases, plain
    FFN), `qwen2_moe` (stacked experts and a shared one of linear modules), `mixtral`.
    """
    import transformers as t

    common = dict(vocab_size=101, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    grouped = dict(
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        intermediate_size=40,
        max_position_embeddings=64,
    )
    experts = dict(moe_intermediate_size=20, shared_expert_intermediate_size=28)
    config: t.PretrainedConfig
    match name:
        case "llama":
            config = t.LlamaConfig(**common, **grouped)
        case "gpt2":
            config = t.GPT2Config(
                **common, n_embd=32, n_layer=layers, n_head=4, n_inner=40, n_positions=64
            )
        case "opt":
            config = t.OPTConfig(
                **common,
                hidden_size=32,
                num_hidden_layers=layers,
                num_attention_heads=4,
                ffn_dim=40,
                max_position_embeddings=64,
                word_embed_proj_dim=32,
            )
        case "qwen2_moe":
            config = t.Qwen2MoeConfig(
                **common, **grouped, **experts, num_experts=4, num_experts_per_tok=2
            )
        case "mixtral":
            config = t.MixtralConfig(**common, **grouped, num_local_experts=4)
        case _:
            raise ValueError(name)
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            scale = p.shape[-1] ** -0.5 if p.dim() > 1 else 0.3
            p.copy_(torch.randn_like(p) * scale + (1.0 if p.dim() == 1 else 0.0))
    return model
