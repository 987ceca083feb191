"""Small Llamas whose checkpoints several tests write: even, and with widths that differ by layer;
and what an attacker does to a folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunekit.checkpoint.integrity import digest, seal
from prunekit.checkpoint.manifest import MANIFEST


def llama(tie: bool = False, **over) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 8,
    }
    config = LlamaConfig(
        **{
            **sizes,
            "num_hidden_layers": 3,
            "vocab_size": 100,
            "tie_word_embeddings": tie,
            "pad_token_id": 0,
            **over,
        }
    )
    config.initializer_range = 0.5
    return LlamaForCausalLM(config).eval()


def narrow(linear: nn.Linear, axis: int, keep: torch.Tensor) -> None:
    linear.weight = nn.Parameter(linear.weight.detach().index_select(axis, keep).clone())
    linear.out_features, linear.in_features = linear.weight.shape


def uneven(model: nn.Module) -> nn.Module:
    """Widths that differ by layer, and one key/value head with its queries gone from the middle
    layer.
    """
    for i, layer in enumerate(model.model.layers):
        keep = torch.arange(64)[: 64 - 9 * (i + 1)]
        for linear, axis in (
            (layer.mlp.gate_proj, 0),
            (layer.mlp.up_proj, 0),
            (layer.mlp.down_proj, 1),
        ):
            narrow(linear, axis, keep)
    attention = model.model.layers[1].self_attn
    for linear, axis, width in (
        (attention.q_proj, 0, 16),
        (attention.k_proj, 0, 8),
        (attention.v_proj, 0, 8),
        (attention.o_proj, 1, 16),
    ):
        narrow(linear, axis, torch.cat([torch.arange(width), torch.arange(2 * width, 3 * width)]))
    return model


def resealed(folder: Path, **changes: Any) -> None:
    """What an attacker would do: hashes and seal made to fit the damage."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"] = {
        name: digest(folder / name) for name in manifest["files"] if (folder / name).is_file()
    }
    manifest.update(changes)
    manifest["seal"] = seal(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def change_json(file: Path, change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
