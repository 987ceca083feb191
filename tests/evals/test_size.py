"""How big a model is: what counts once, and what does not count."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from prunekit.evals.size import size

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
BLOCKS = 2 * (4 * 64 * 64 + 3 * 64 * 96 + 2 * 64) + 64


def llama(**over):
    return AutoModelForCausalLM.from_config(
        LlamaConfig(**{**SIZES, "num_key_value_heads": 4, **over})
    )


def test_untied_and_tied():
    untied, tied = (
        size(llama(tie_word_embeddings=False), None),
        size(llama(tie_word_embeddings=True), None),
    )
    assert untied["params"] == BLOCKS + 2 * 128 * 64
    assert tied["params"] == BLOCKS + 128 * 64
    assert untied["params_without_embedding"] == tied["params_without_embedding"] == BLOCKS


def test_zeros_and_dtype():
    model = llama(tie_word_embeddings=False)
    before = size(model, None)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:10] = 0
    after = size(model, None)
    assert before["params_nonzero"] - after["params_nonzero"] == 640
    assert after["params"] == before["params"]
    assert (
        size(model.half(), None)["weights_mib"]
        == before["weights_mib"] / 2
        == before["params"] * 2 / 2**20
    )


def test_position_embeddings_are_embeddings():
    model = AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=128, n_embd=64, n_layer=1, n_head=4, n_positions=32)
    )
    assert (
        size(model, None)["params"] - size(model, None)["params_without_embedding"]
        == (128 + 32) * 64
    )


def test_meta_device_has_no_zeros_to_count():
    assert set(size(llama().to("meta"), None)) == {
        "params",
        "params_without_embedding",
        "weights_mib",
    }
