"""Uneven models in the form of Nemotron-NAS: sizes by the engines' formula, what is refused, and
the real vLLM.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from engines import ascii_tokenizer, completed, greedy, needs
from safetensors.torch import load_file
from serving_models import cut, tiny, with_biases, without
from torch import nn

from prunekit.checkpoint import save
from prunekit.errors import ConfigError
from prunekit.export.command import main
from prunekit.export.configuration_decilm import DeciLMConfig
from prunekit.export.nemotron_nas import ffn_mult, nemotron_nas_content

WIDE = {"hidden": 192, "head_dim": 32}


def exported(tmp_path: Path, model: nn.Module, name: str = "checkpoint") -> Path:
    save(model, ascii_tokenizer(), tmp_path / name)
    assert main([str(tmp_path / name), "--to", "nemotron-nas"]) == 0
    return tmp_path / f"{name}-nemotron-nas"


@pytest.mark.parametrize("hidden", [64, 576, 2048, 4096, 5120])
def test_engines_get_the_width_from_the_multiple(hidden: int) -> None:
    for width in range(256, 16384, 256):
        raw = int(2 * ffn_mult(width, hidden) * hidden / 3)
        assert raw + -raw % 256 == width


def test_the_folder_has_sizes_by_layer_and_tensors_filled_up(tmp_path: Path) -> None:
    model = without(cut(tiny("llama"), neurons=[5, 0, 17]), (1, "self_attn"))
    model.generation_config.eos_token_id = [2, 7]
    folder = exported(tmp_path, model)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 7]
    config = DeciLMConfig(**json.loads((folder / "config.json").read_text()))
    blocks = config.block_configs
    assert [b.attention.no_op for b in blocks] == [False, True, False]
    assert blocks[0].attention.n_heads_in_group == 2
    assert [b.ffn.intermediate_size for b in blocks] == [256] * 3
    assert not hasattr(blocks[0].ffn, "missing")
    tensors = load_file(folder / "model.safetensors")
    assert "model.layers.1.input_layernorm.weight" not in tensors
    down, mine = tensors["model.layers.0.mlp.down_proj.weight"], model.model.layers[0].mlp.down_proj
    width = mine.weight.shape[1]
    assert down[:, :width].equal(mine.weight)
    assert not down[:, width:].any()
    assert (folder / "tokenizer.json").is_file()


def test_fused_matrices_are_written_in_parts(tmp_path: Path) -> None:
    model = cut(tiny("phi3"), neurons=[5, 0, 17])
    tensors = load_file(exported(tmp_path, model) / "model.safetensors")
    fused = model.model.layers[0].self_attn.qkv_proj.weight
    parts = [tensors[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qkv"]
    assert torch.cat(parts).equal(fused)


def test_a_number_of_heads_that_the_class_refuses(tmp_path: Path) -> None:
    """10 heads of 8 channels on 96, and 24 on 64, where more channels are as near as more heads;
    before it is saved, and after.
    """
    for hidden, heads, kv, width, gone in ((96, 12, 6, 8, 1), (64, 32, 32, 4, 8)):
        made = tiny("llama", hidden=hidden, heads=heads, kv=kv, head_dim=width)
        model = cut(made, heads=[gone] * 3, neurons=[5, 0, 17])
        left = heads - gone * heads // kv
        assert nemotron_nas_content(model).config["num_attention_heads"] == left
        config = json.loads((exported(tmp_path, model, str(heads)) / "config.json").read_text())
        assert config["num_attention_heads"] == left
        assert config["hidden_size"] == hidden


def test_one_bias_gives_all_of_a_half_one() -> None:
    content = nemotron_nas_content(with_biases(tiny("llama")))
    assert content.config["attention_bias"]
    assert content.config["mlp_bias"]
    assert content.tensors["model.layers.2.self_attn.o_proj.bias"].any()
    assert not content.tensors["model.layers.2.self_attn.q_proj.bias"].any()
    assert not nemotron_nas_content(tiny("llama")).config["mlp_bias"]


def test_a_first_layer_without_attention_has_one_of_zeros() -> None:
    content = nemotron_nas_content(without(tiny("llama"), (0, "self_attn")))
    assert not content.config["block_configs"][0]["attention"]["no_op"]
    query = content.tensors["model.layers.0.self_attn.q_proj.weight"]
    assert query.shape == content.tensors["model.layers.1.self_attn.q_proj.weight"].shape
    assert not query.any()


def test_what_has_no_place_is_refused(tmp_path: Path) -> None:
    for model, words in (
        (cut(tiny("llama"), heads=[1, 0, 2]), "query heads"),
        (tiny("qwen3"), "not qwen3"),
        (tiny("llama", hidden_act="relu"), "hidden_act"),
    ):
        with pytest.raises(ConfigError, match=words):
            nemotron_nas_content(model)
    folder = exported(tmp_path, tiny("llama"))
    with pytest.raises(ConfigError, match="there already"):
        main([str(tmp_path / "checkpoint"), "--to", "nemotron-nas", "--out", str(folder)])


@pytest.mark.slow
def test_vllms_own_class_says_what_transformers_says(tmp_path: Path) -> None:
    needs("vLLM")
    models = {
        "uneven": cut(tiny("llama", **WIDE), neurons=[5, 0, 17]),
        "heads": cut(tiny("llama", **WIDE), heads=[1, 1, 1], neurons=[5, 0, 17]),
        "biases": with_biases(tiny("llama", **WIDE)),
        "qwen2": cut(tiny("qwen2", **WIDE), neurons=[5, 0, 17]),
        "phi3": cut(tiny("phi3", **WIDE), neurons=[5, 0, 17]),
        "gone": without(tiny("llama", **WIDE), (1, "self_attn"), (2, "mlp")),
        "first": without(tiny("llama", **WIDE), (0, "self_attn")),
    }
    folders = [exported(tmp_path, model, name) for name, model in models.items()]
    asked = [{"folder": str(f), "implementation": "vllm"} for f in folders]
    for (name, model), answer in zip(models.items(), completed("vLLM", asked)):
        tokens, logs = greedy(model)
        assert answer.get("tokens") == tokens, (name, answer)
        assert torch.tensor(answer["logprobs"]).allclose(torch.tensor(logs), atol=1e-3), name
