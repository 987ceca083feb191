"""Eight architectures that between them have every layout of attention and FFN that is common, with
random weights.
"""

from __future__ import annotations

import gates
import pytest
from torch import nn

LLAMA = {
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "num_hidden_layers": 3,
    "vocab_size": 128,
}
BIG = {
    **LLAMA,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
}
OLD = {
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_hidden_layers": 3,
    "vocab_size": 128,
    "max_position_embeddings": 64,
}
ARCHITECTURES = {
    "llama": ("LlamaConfig", {**BIG, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", BIG),
    "qwen3": ("Qwen3Config", BIG),
    "gpt_neox": ("GPTNeoXConfig", {**OLD, "intermediate_size": 96}),
    "gpt2": (
        "GPT2Config",
        {
            "n_embd": 64,
            "n_head": 8,
            "n_layer": 3,
            "n_inner": 96,
            "vocab_size": 128,
            "n_positions": 64,
            "n_ctx": 64,
        },
    ),
    "phi3": ("Phi3Config", {k: v for k, v in BIG.items() if k != "head_dim"}),
    "opt": ("OPTConfig", {**OLD, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "bloom": ("BloomConfig", {"hidden_size": 64, "n_head": 8, "n_layer": 3, "vocab_size": 128}),
}


@pytest.fixture(scope="session", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> nn.Module:
    """A tiny model; copy it before changing it."""
    return gates.build(*ARCHITECTURES[request.param])


@pytest.fixture(scope="session")
def llama() -> nn.Module:
    """A tiny tied GQA Llama; copy it before changing it."""
    return gates.build(*ARCHITECTURES["llama"])


@pytest.fixture(scope="session", params=gates.MODELS)
def passing_norms_and_routers(request: pytest.FixtureRequest) -> nn.Module:
    """Experts; ranks with a norm over them; LayerNorms without parameters. Copy it before changing
    it.
    """
    return gates.build(*gates.MODELS[request.param])


@pytest.fixture(scope="session")
def mixtral() -> nn.Module:
    """Two blocks with five experts each; copy it before changing it."""
    return gates.build(*gates.MODELS["mixtral"])
