"""Multiply-accumulates: the paper's table, formulas by hand, and what torch counts."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from prunekit.evals.macs import flop_counter_macs, macs, macs_eval
from prunekit.registry import evals

# The models of LLM-Pruner's Table 3: (blocks, heads, FFN width, hidden channels) and the paper's
# figures in G.
TABLE3 = {
    "dense": (range(0), 32, 11008, 4096, 424.021, 424.02),
    "block20": (range(4, 30), 24, 8256, 4096, 339.603, 339.60),
    "block50": (range(3, 31), 13, 4403, 4096, 206.585, 206.59),
    "channel20": (range(0), 32, 11008, 3276, 339.361, 339.36),
    "channel50": (range(0), 32, 11008, 2048, 212.578, 212.58),
}


def llama7b() -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(LlamaConfig())  # the class's defaults are LLaMA-7B


def resize(module: nn.Module, rows: int | None = None, columns: int | None = None) -> None:
    old = module.weight
    shape = [rows or old.shape[0], *([columns or old.shape[1]] if old.ndim == 2 else [])]
    module.weight = nn.Parameter(torch.empty(shape, device="meta"))


def sliced(blocks: range, heads: int, ffn: int, hidden: int) -> nn.Module:
    model = llama7b()
    for i in blocks:
        layer = model.model.layers[i]
        for m in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            resize(m, rows=heads * 128)
        resize(layer.self_attn.o_proj, columns=heads * 128)
        resize(layer.mlp.gate_proj, rows=ffn)
        resize(layer.mlp.up_proj, rows=ffn)
        resize(layer.mlp.down_proj, columns=ffn)
    if hidden != 4096:
        resize(model.model.embed_tokens, columns=hidden)
        for m in model.modules():
            if type(m).__name__ == "LlamaRMSNorm":
                resize(m, rows=hidden)
        for name, m in model.named_modules():
            if isinstance(m, nn.Linear):
                into = name.endswith(("o_proj", "down_proj"))
                resize(m, **({"rows": hidden} if into else {"columns": hidden}))
    return model


@pytest.mark.parametrize("row", TABLE3)
def test_table_3_of_the_paper(row: str):
    blocks, heads, ffn, hidden, derived, paper = TABLE3[row]
    counted = macs(sliced(blocks, heads, ffn, hidden), tokens=64) / 1e9
    assert round(counted, 3) == derived
    assert round(counted, 2) == paper


def tiny(**over) -> nn.Module:
    sizes = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return AutoModelForCausalLM.from_config(
        LlamaConfig(**{**sizes, "num_key_value_heads": 2, **over})
    ).eval()


def test_grouped_queries_by_hand():
    q, C, F, V, H, G, D = 8, 64, 96, 128, 4, 2, 16
    attention = 2 * q * (H + G) * D + (2 * q * q * D + q * q) * H + q * C * D * (2 * H + 2 * G)
    mlp = 3 * q * C * F + q * F
    assert macs(tiny(), tokens=q) == 2 * (attention + mlp + 2 * 2 * q * C) + 2 * q * C + q * C * V


def test_tied_head_counts_once_as_head():
    assert macs(tiny(tie_word_embeddings=True)) == macs(tiny(tie_word_embeddings=False))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_flop_counter_sees_the_matrix_products(attention: str):
    q, model = 64, tiny()
    model.set_attn_implementation(attention)
    beyond = (
        2 * (2 * q * 6 * 16 + q * q * 4 + q * 96 + 2 * 2 * q * 64) + 2 * q * 64
    )  # rotary, softmax, activation, norms
    assert flop_counter_macs(model, q) == macs(model, q) - beyond


def test_cross_check_is_left_out_where_nothing_runs_or_nobody_asks():
    assert (
        macs_eval(tiny(), None, cross_check=False)
        == macs_eval(tiny().to("meta"), None)
        == {"macs": macs(tiny())}
    )


# Biases, q/k norms, fused qkv and gate_up in either order, Conv1D, no rotary embedding, experts,
# latent attention.
ARCHS = [
    "llama",
    "qwen2",
    "qwen3",
    "gpt_neox",
    "gpt2",
    "phi3",
    "opt",
    "bloom",
    "mixtral",
    "qwen3_moe",
    "deepseek_v3",
    "olmo2",
    "gpt_oss",
]


@pytest.mark.parametrize("arch", ARCHS)
def test_formulas_and_flop_counter_agree(arch: str):
    model = tiny_model(arch)
    formula, counted = macs(model, 64), flop_counter_macs(model, 64)
    assert counted < formula < 1.2 * counted, (formula, counted)


def test_eval_is_registered_and_leaves_the_model_alone():
    model = tiny().train()
    model.get_submodule("model.layers.0").eval()
    modes = [m.training for m in model.modules()]
    assert set(evals.entry("macs").fn(model, None)) == {"macs", "macs_flop_counter"}
    assert [m.training for m in model.modules()] == modes
    assert math.isfinite(macs(model))
