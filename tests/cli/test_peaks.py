"""The peaks that a plan foresees, against measured ones."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model

from prunekit.cli import peaks
from prunekit.cli.compose import composed
from prunekit.runner import preflight


@pytest.mark.parametrize(
    ("options", "measured"),
    [
        (["calib.samples=10", "calib.length=64"], 6674),
        (["calib.samples=4", "calib.length=64", "criterion.batch=2"], 8961),
    ],
)
def test_the_peak_of_gradients_is_right_within_a_fifth(options, measured):
    """MiB of the process as measured on a CPU with random weights of TinyLlama's shape (1.1 B, in
    float32).
    """
    shape = "{model_type:llama,hidden_size:2048,intermediate_size:5632,num_hidden_layers:22,"
    shape += "num_attention_heads:32,num_key_value_heads:4,vocab_size:32000}"
    model = ["model=hf", "model.path=random/tinyllama", f"model.config={shape}"]
    model += ["model.dtype=float32", "model.device=cpu"]
    (cfg,) = composed([*model, "exclude=none", "eval=quick", "ratio.target=0.2", *options])
    parts = preflight.build_components(cfg)
    found = peaks.scoring_peak(parts.model(meta=True)[0], parts, cfg)
    assert found / 2**20 == pytest.approx(measured, rel=0.2)


def test_weights_on_the_disk_are_planned_by_the_block():
    words = ["model=tiny_llama", "model.device=cpu", "exclude=none", "eval=quick"]
    (cfg,) = composed(words)
    model = tiny_model("llama", 4).to(torch.bfloat16)
    whole = peaks.weight_bytes(model)
    assert peaks.resident(model, cfg) == whole
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    cfg["model"] |= {"weights": "disk"}
    assert peaks.resident(model, cfg) == 2 * block < whole
    cfg["model"] |= {"compute": "float32"}
    assert peaks.resident(model, cfg) == 6 * block
    cfg["model"] |= {"compute": None, "weights": "host"}
    assert peaks.resident(model, cfg) == 4 * block, "one runs while the next one is copied"


def test_what_is_found_of_a_block_is_planned_where_blocks_come_in_turn():
    """On an accelerator, whose allocator counts no libraries."""
    model = tiny_model("llama", 4)
    tokens = 4 * 32
    shapes = [m.weight.shape for m in model.model.layers[0].modules() if hasattr(m, "in_features")]
    wide = tokens * sum(s[0] for s in shapes) * 4
    block = sum(p.numel() for p in model.model.layers[0].parameters()) * 4
    words = ["model=tiny_llama", "exclude=none", "eval=quick", "ratio.of=prunable"]
    words += ["calib.samples=4", "calib.length=32"]

    def peak(*more):
        (cfg,) = composed([*words, *more])
        parts = preflight.build_components(cfg)
        cfg["model"] |= {"weights": "host"}
        return peaks.scoring_peak(model, parts, cfg)

    assert peak("pruner=unstructured", "criterion=wanda") == 2 * block + block + wide
    grams = 4 * (sum(s[1] ** 2 for s in shapes) + 2 * max(s[1] for s in shapes) ** 2)
    assert peak("pruner=sparsegpt", "criterion=none") == 2 * block + grams + wide
    assert peak("criterion=wanda_sp") == 2 * block + wide


def test_gradients_block_by_block_are_planned_so():
    """Where weights lie on the disk or it is asked for; what waits in files is not counted."""
    words = ["model=tiny_llama", "model.device=cpu", "exclude=none", "eval=quick"]
    words += ["calib.samples=64", "calib.length=64", "criterion.batch=2"]
    model = tiny_model("llama", 4)

    def peak(*more, **fields):
        (cfg,) = composed([*words, *more])
        parts = preflight.build_components(cfg)
        cfg["model"] |= fields
        return peaks.scoring_peak(model, parts, cfg) - peaks.resident(model, cfg)

    asked = peak("criterion.by_block=true")
    assert asked != peak()
    assert peak(weights="disk") == asked
    waiting = (4 + 1) * 64 * 64 * 64 * 4
    assert asked - peak("criterion.by_block=true", "criterion.store=disk") == waiting
    assert asked - peak("criterion.by_block=true", "criterion.store=bfloat16") == waiting // 2
