"""What the tests of `gated` share: tokens, logits, random masks and gates, models whose units pass
norms and routers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prunekit.graph.small_model import randomised
from prunekit.types import Group

TOKENS = torch.randint(8, 100, (2, 12), generator=torch.Generator().manual_seed(1))
ROUTED = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 128,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
}
MODELS = {
    "mixtral": ("MixtralConfig", {**ROUTED, "num_local_experts": 5}),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **ROUTED,
            "num_key_value_heads": 4,
            "n_routed_experts": 6,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 24,
            "q_lora_rank": 20,
            "kv_lora_rank": 12,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 10,
            "first_k_dense_replace": 1,
        },
    ),
    "olmo": (
        "OlmoConfig",
        {k: v for k, v in ROUTED.items() if k != "num_experts_per_tok"},
    ),
}
"""Experts; experts with a bias for choosing, and ranks with a norm over them; LayerNorms without
parameters.
"""


def build(config: str, sizes: dict[str, Any]) -> nn.Module:
    """A causal LM of transformers' class `config`, with random weights that all matter."""
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, config)(**sizes)
    ).eval()
    model.config.use_cache = False
    model = randomised(model)
    for name, buffer in model.named_buffers():
        if "correction_bias" in name:
            buffer += torch.linspace(0, 2, len(buffer))
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def off(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def random_masks(groups: list[Group], kind: str, seed: int = 0) -> dict[str, Tensor]:
    """A third of the units of every group of a kind lost, one at least."""
    draw, kept = torch.Generator().manual_seed(seed), {}
    for g in groups:
        if g.kind == kind:
            kept[g.name] = torch.ones(g.units, dtype=torch.bool)
            lost = torch.randperm(g.units, generator=draw)[: max(1, g.units // 3)]
            kept[g.name][lost] = False
    return kept


def random_z(groups: list[Group], kind: str, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {g.name: torch.rand(g.shape, generator=draw) for g in groups if g.kind == kind}
