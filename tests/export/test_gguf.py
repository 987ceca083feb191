"""GGUF files that transformers' own reader gives back, and refusals that say why."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import llama
from gguf import GGMLQuantizationType as Q
from gguf.quants import dequantize, quantize
from tiny_models import tiny_model
from torch import nn
from transformers import GPTJConfig, GPTJForCausalLM

from prunekit import graph
from prunekit.checkpoint import save
from prunekit.checkpoint.remote_code.runtime_modules import LowRank, insert
from prunekit.errors import ConfigError
from prunekit.export.command import main
from prunekit.export.gguf import content_of, write_gguf

TYPES = {"f32": Q.F32, "f16": Q.F16, "bf16": Q.BF16, "q8_0": Q.Q8_0}


def family(kind: str) -> nn.Module:
    import transformers as t

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
    }
    config, model = {
        "llama": (t.LlamaConfig, t.LlamaForCausalLM),
        "qwen2": (t.Qwen2Config, t.Qwen2ForCausalLM),
        "qwen3": (t.Qwen3Config, t.Qwen3ForCausalLM),
    }[kind]
    # The reader knows no head size of Qwen2, and for Qwen3 only the one that all of them have.
    width = {"llama": {"head_dim": 16}, "qwen3": {"head_dim": 128}}.get(kind, {})
    made = config(
        **sizes,
        **width,
        num_hidden_layers=3,
        initializer_range=0.3,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    return model(made).eval()


def rounded(model: nn.Module, kind: Q) -> nn.Module:
    """The model with its matrices rounded as the type rounds them."""
    model = copy.deepcopy(model)
    for p in model.parameters():
        if p.dim() > 1:
            p.data = torch.from_numpy(
                np.array(dequantize(quantize(p.detach().numpy(), kind), kind)).reshape(p.shape)
            )
    return model


def tiny_tokenizer(folder: Path, byte_level: bool = True):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    text = ["the quick brown fox jumps over the lazy dog 123 456"] * 4
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    )


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_read_back_to_the_precision_of_the_type(
    tmp_path: Path, tokens: torch.Tensor, kind: str, type: str
) -> None:
    from transformers import AutoModelForCausalLM

    model = family(kind)
    write_gguf(model, None, tmp_path / "out.gguf", type=type)
    assert [f.name for f in tmp_path.iterdir()] == ["out.gguf"]
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="out.gguf", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            read(tokens).logits, rounded(model, TYPES[type])(tokens).logits, rtol=1e-4, atol=1e-4
        )
        if type == "f32":
            torch.testing.assert_close(
                read(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5
            )


def test_pruned_checkpoint_with_its_tokenizer(tmp_path: Path, tokens: torch.Tensor) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = tiny_tokenizer(tmp_path)
    model = llama(vocab_size=len(tokenizer) + 5, tie=True)
    kept = {
        g.name: torch.arange(g.units) % 4 != 0 for g in graph.discover(model) if g.kind == "neurons"
    }
    graph.remove(model, kept)
    save(model, tokenizer, tmp_path / "checkpoint")
    assert (
        main(f"{tmp_path}/checkpoint --to gguf --out {tmp_path}/out.gguf --type f32".split()) == 0
    )
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="out.gguf", dtype=torch.float32
    ).eval()
    words = AutoTokenizer.from_pretrained(tmp_path, gguf_file="out.gguf")
    text = "the lazy fox 46 <|endoftext|> über"
    assert words(text).input_ids == tokenizer(text).input_ids
    with torch.no_grad():
        torch.testing.assert_close(read(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)


def test_the_file_lies_beside_the_folder_by_default(tmp_path: Path) -> None:
    save(llama(), None, tmp_path / "checkpoint")
    assert main([str(tmp_path / "checkpoint"), "--to", "gguf"]) == 0
    assert (tmp_path / "checkpoint.gguf").is_file()


def refusal(tmp_path: Path, model: nn.Module, **how) -> str:
    with pytest.raises(ConfigError) as error:
        write_gguf(model, None, tmp_path / "x.gguf", **how)
    assert not list(tmp_path.glob("*.gguf"))
    return str(error.value)


def test_what_the_engine_would_compute_differently_is_refused(tmp_path: Path) -> None:
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert "'dynamic'" in refusal(tmp_path, llama(rope_parameters=dynamic))
    assert "hidden_act='relu'" in refusal(tmp_path, llama(hidden_act="relu"))
    assert "possible: f32" in refusal(tmp_path, llama(), type="q4_0")
    other = GPTJForCausalLM(GPTJConfig(n_embd=32, n_head=2, n_layer=1, vocab_size=64, rotary_dim=8))
    assert "no row for gptj" in refusal(tmp_path, other)


def test_other_widths_by_layer_only_where_the_graph_has_them(tmp_path: Path) -> None:
    def narrow(kind: str) -> nn.Module:
        model = family(kind)
        (group,) = [g for g in graph.discover(model) if g.name == "neurons.1"]
        return graph.remove(model, {group.name: torch.arange(group.units) > 8})

    assert "ratio.loadable=stock" in refusal(tmp_path, narrow("qwen3"))
    write_gguf(narrow("qwen2"), None, tmp_path / "x.gguf")


def test_what_is_rotated_is_what_the_model_rotates(tmp_path: Path) -> None:
    """Llama does not read `partial_rotary_factor`, Phi-3 does; where pairs of channels are moved,
    half a head cannot be turned.
    """
    half = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    assert content_of(llama(rope_parameters=half)).facts["rope_dimension_count"] == 8
    model = tiny_model("phi3", 3, rope_parameters=half)
    width = model.config.hidden_size // model.config.num_attention_heads
    assert content_of(model).facts["rope_dimension_count"] == width // 2
    graph.remove(model, {"neurons.1": torch.arange(96) >= 16})
    assert f"{width // 2} of {width} channels" in refusal(tmp_path, model)


def test_a_run_time_module_is_named(tmp_path: Path) -> None:
    model = llama()
    weight = model.model.layers[1].mlp.down_proj.weight.detach()
    insert(model, "model.layers.1.mlp.down_proj", LowRank.of(weight[:, :4], weight[:4]))
    assert "low_rank at model.layers.1.mlp.down_proj" in refusal(tmp_path, model)


def test_another_scale_of_attention_is_named(tmp_path: Path) -> None:
    model = llama()
    model.model.layers[1].self_attn.scaling = 0.5
    assert "model.layers.1.self_attn.scaling" in refusal(tmp_path, model)
