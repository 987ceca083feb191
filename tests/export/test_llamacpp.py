"""GGUF files in the real llama.cpp: the greedy tokens are those of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engines import VOCAB, ascii_tokenizer, greedy, llamacpp, serve
from tiny_models import tiny_model
from torch import nn

from prunekit import graph
from prunekit.checkpoint import load, save
from prunekit.checkpoint.remote_code.runtime_modules import Bypass, insert
from prunekit.export.gguf import write_gguf
from prunekit.export.gguf_families import FAMILIES

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
            linear.bias = nn.Parameter(0.3 * torch.randn(96, generator=generator))
    return model


def check(tmp_path: Path, models: dict[str, nn.Module], type: str = "f32") -> None:
    llamacpp()
    tokenizer, files = ascii_tokenizer(), []
    for name, model in models.items():
        save(model, tokenizer, tmp_path / name)
        read, words = load(tmp_path / name)
        files.append(write_gguf(read, words, tmp_path / f"{name}.gguf", type=type))
    for (name, model), answer in zip(models.items(), serve(files)):
        tokens, logs = greedy(model)
        assert answer.get("tokens") == tokens, (name, answer)
        assert torch.tensor(answer["logprobs"]).allclose(torch.tensor(logs), atol=3e-3), name


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_every_family_says_what_transformers_says(tmp_path: Path, kind: str) -> None:
    check(tmp_path, {"dense": tiny(kind), "fewer_blocks": without_block(tiny(kind))})


@pytest.mark.parametrize("kind", ["qwen3", "gemma", "gemma2", "granite"])
def test_fewer_heads_in_every_layer(tmp_path: Path, kind: str) -> None:
    check(tmp_path, {"heads": cut(tiny(kind), heads=[1, 1, 1], neurons=[8, 8, 8])})


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "phi3"])
def test_sizes_that_differ_by_layer(tmp_path: Path, kind: str) -> None:
    check(
        tmp_path,
        {
            "ffn": cut(tiny(kind), neurons=[5, 0, 17]),
            "heads": cut(tiny(kind), heads=[1, 0, 2]),
            "both": cut(tiny(kind), heads=[1, 0, 2], neurons=[5, 0, 17]),
            "all_heads": cut(tiny(kind), heads=[1, 1, 1]),
        },
    )


def test_biases_and_scaled_rotary_frequencies(tmp_path: Path) -> None:
    biased = {"attention_bias": True, "mlp_bias": True}
    check(
        tmp_path,
        {
            "added": with_biases(cut(tiny("llama"), heads=[1, 0, 2], neurons=[5, 0, 17])),
            "own": tiny("llama", **biased),
            "own_uneven": cut(tiny("llama", **biased), heads=[1, 0, 2], neurons=[5, 0, 17]),
            "scaled": tiny("llama", rope_parameters=LLAMA3),
            "scaled_uneven": cut(tiny("llama", rope_parameters=LLAMA3), heads=[1, 0, 2]),
        },
    )


def test_layers_without_attention_or_feed_forward(tmp_path: Path) -> None:
    """Also in the first layer, from which the engine takes the size of a head, and in the last,
    where it drops all positions but the last.
    """
    cases = [[(i, half)] for i in range(3) for half in ("self_attn", "mlp")]
    cases += [[(1, "self_attn"), (1, "mlp")], [(0, "self_attn"), (2, "mlp")]]
    check(tmp_path, {str(i): without(tiny("llama"), *case) for i, case in enumerate(cases)})


@pytest.mark.parametrize("type", ["f16", "bf16", "q8_0"])
def test_smaller_types_are_read(tmp_path: Path, type: str) -> None:
    llamacpp()
    model = cut(tiny("llama"), heads=[1, 0, 2], neurons=[32, 0, 0])
    file = write_gguf(model, ascii_tokenizer(), tmp_path / "out.gguf", type=type)
    (answer,) = serve([file], count=1)
    tokens, logs = greedy(model, count=1)
    assert answer["tokens"] == tokens
    assert answer["logprobs"][0] == pytest.approx(logs[0], abs=0.1)
