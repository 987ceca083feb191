"""Checkpoints in the real vLLM, by its backend that runs transformers' modules: the greedy tokens
are those of transformers.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engines import ascii_tokenizer, completed, greedy, needs
from serving_models import cut, tiny, with_biases, without, without_block
from torch import nn

from prunekit.checkpoint import save

WIDE = {"hidden": 192, "head_dim": 32}
"""vLLM's attention on a CPU takes heads of 32 channels and more."""


def check(tmp_path: Path, models: dict[str, nn.Module]) -> None:
    needs("vLLM")
    tokenizer = ascii_tokenizer()
    folders = [save(model, tokenizer, tmp_path / name) for name, model in models.items()]
    answers = completed("vLLM", [{"folder": str(f)} for f in folders])
    for (name, model), answer in zip(models.items(), answers):
        tokens, logs = greedy(model)
        assert answer.get("tokens") == tokens, (name, answer)
        assert torch.tensor(answer["logprobs"]).allclose(torch.tensor(logs), atol=1e-3), name


@pytest.mark.slow
def test_families_whose_layers_differ_in_heads_and_widths(tmp_path: Path) -> None:
    needs("vLLM")
    asked = {"gemma2": {"query_pre_attn_scalar": 32}}
    kinds = ("llama", "qwen2", "qwen3", "gemma2", "phi3", "gpt_neox")
    models = {
        kind: cut(tiny(kind, **WIDE, **asked.get(kind, {})), heads=[1, 0, 2], neurons=[5, 0, 17])
        for kind in kinds
    }
    models["mixtral"] = cut(tiny("mixtral", **WIDE), heads=[1, 0, 2], neurons=[5, 0, 17])
    check(tmp_path, models)


@pytest.mark.slow
def test_other_shapes_that_pruning_leaves(tmp_path: Path) -> None:
    needs("vLLM")
    check(
        tmp_path,
        {
            "biases": with_biases(tiny("llama", **WIDE)),
            "fewer_blocks": without_block(tiny("llama", **WIDE)),
            "no_ffn": without(tiny("llama", **WIDE), (1, "mlp")),
        },
    )


@pytest.mark.slow
def test_the_real_model(tmp_path: Path, smollm2) -> None:
    import copy

    needs("vLLM")
    model = copy.deepcopy(smollm2[0])
    layers = range(model.config.num_hidden_layers)
    heads, neurons = [i % 3 for i in layers], [32 * (i % 7) for i in layers]
    check(tmp_path, {"smollm2": cut(model, heads=heads, neurons=neurons)})
