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
