"""GGUF files in the real llama.cpp: the greedy tokens are those of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engines import ascii_tokenizer, completed, greedy, needs
from serving_models import LLAMA3, cut, tiny, with_biases, without, without_block
from torch import nn

from prunekit.checkpoint import load, save
from prunekit.export.gguf import write_gguf
from prunekit.export.gguf_families import FAMILIES


def check(tmp_path: Path, models: dict[str, nn.Module], type: str = "f32") -> None:
    needs("llama.cpp")
    tokenizer, files = ascii_tokenizer(), []
    for name, model in models.items():
        save(model, tokenizer, tmp_path / name)
        read, words = load(tmp_path / name)
        files.append(write_gguf(read, words, tmp_path / f"{name}.gguf", type=type))
    for (name, model), answer in zip(
        models.items(), completed("llama.cpp", [{"file": str(f)} for f in files])
    ):
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


def test_heads_that_do_not_divide_the_hidden_size(tmp_path: Path) -> None:
    many = {"hidden": 64, "heads": 32, "kv": 32, "head_dim": 4}
    check(tmp_path, {"many": cut(tiny("llama", **many), heads=[8, 8, 8], neurons=[5, 0, 17])})


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_fewer_experts_in_every_layer(tmp_path: Path, kind: str) -> None:
    check(tmp_path, {"experts": cut(tiny(kind), experts=[1, 1, 1])})


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
    needs("llama.cpp")
    model = cut(tiny("llama"), heads=[1, 0, 2], neurons=[32, 0, 0])
    file = write_gguf(model, ascii_tokenizer(), tmp_path / "out.gguf", type=type)
    (answer,) = completed("llama.cpp", [{"file": str(file)}], count=1)
    tokens, logs = greedy(model, count=1)
    assert answer["tokens"] == tokens
    assert answer["logprobs"][0] == pytest.approx(logs[0], abs=0.1)


def test_k_quants_are_made_by_the_engine_itself(tmp_path: Path) -> None:
    """Q4_K where rows are multiples of 256, and what llama.cpp takes instead where they are not;
    the engine says of them what it says of a file of the same rounded weights.
    """
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from numpy.linalg import norm

    needs("llama.cpp")
    wide = {"hidden": 256, "heads": 8, "kv": 4, "head_dim": 32, "ffn": 288}
    model = cut(tiny("llama", **wide), heads=[0, 1, 0], neurons=[32, 32, 0])
    file = write_gguf(model, ascii_tokenizer(), tmp_path / "out.gguf", type="q4_k")
    read = {t.name: t for t in GGUFReader(file).tensors}
    kinds = {name: t.tensor_type.name for name, t in read.items()}
    assert kinds["blk.0.ffn_down.weight"] == kinds["blk.0.attn_q.weight"] == "Q4_K"
    assert kinds["blk.1.attn_output.weight"] == kinds["blk.2.ffn_down.weight"] == "Q5_0"
    assert kinds["token_embd.weight"] == "Q6_K"
    full = write_gguf(model, ascii_tokenizer(), tmp_path / "full.gguf", type="f32")
    for tensor in GGUFReader(full, mode="r+").tensors:
        rounded = dequantize(read[tensor.name].data, read[tensor.name].tensor_type)
        assert norm(rounded.ravel() - tensor.data.ravel()) < 0.1 * norm(tensor.data)
        tensor.data[:] = rounded.reshape(tensor.data.shape)
    packed, same = completed("llama.cpp", [{"file": str(f)} for f in (file, full)], count=1)
    assert packed["tokens"] == same["tokens"]
    assert packed["logprobs"] == pytest.approx(same["logprobs"], abs=0.05)
