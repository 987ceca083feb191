"""Tiny models in the shapes that pruning leaves, for serving engines."""

from __future__ import annotations

import torch
from engines import VOCAB
from tiny_models import tiny_model
from torch import nn

from prunekit import graph
from prunekit.checkpoint.remote_code.runtime_modules import Bypass, insert

SIX_HEADS = {"heads": 6, "kv": 3, "hidden": 96, "head_dim": 16}
ASKED = {
    "mistral": {"sliding_window": None},
    "qwen3_moe": {"norm_topk_prob": True},
    "gemma2": {"query_pre_attn_scalar": 16},
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def tiny(kind: str, **fields) -> nn.Module:
    sizes = SIX_HEADS | ASKED.get(kind, {}) | {"vocab_size": VOCAB}
    return tiny_model(kind, layers=3, **(sizes | fields))


def cut(model: nn.Module, **removed: list[int]) -> nn.Module:
    """kind -> how many units of each layer's group go."""
    kept = {
        g.name: torch.arange(g.units) >= removed[g.kind][g.layer]
        for g in graph.discover(model)
        if g.kind in removed
    }
    return graph.remove(model, kept)


def without_block(model: nn.Module) -> nn.Module:
    return graph.remove(model, {"blocks": torch.tensor([True, False, True])})


def without(model: nn.Module, *halves: tuple[int, str]) -> nn.Module:
    for layer, half in halves:
        insert(model, f"model.layers.{layer}.{half}", Bypass(1 if half == "mlp" else 2))
    return model


def with_biases(model: nn.Module) -> nn.Module:
    """As FLAP and OBS leave them: on what writes into the residual stream."""
    generator = torch.Generator().manual_seed(1)
    for layer in model.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.bias = nn.Parameter(
                0.3 * torch.randn(linear.weight.shape[0], generator=generator)
            )
    return model
