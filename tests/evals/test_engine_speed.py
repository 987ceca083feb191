"""Tokens a second in serving engines: dense beside pruned, and what is skipped or refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from engines import ascii_tokenizer, needs
from serving_models import cut, tiny
from torch import nn

from prunekit.errors import ConfigError
from prunekit.evals.engine_speed import compared, rates
from prunekit.registry import calibs, evals
from prunekit.runner import cache
from prunekit.runner.dense import DenseModel

SHORT = {"prompt": 24, "new_tokens": 4, "repeats": 2}
OWN = {"prefill_tokens_per_s", "decode_tokens_per_s", "mib"}
BESIDE = {
    "dense_prefill_tokens_per_s",
    "dense_decode_tokens_per_s",
    "prefill_speedup",
    "decode_speedup",
}


def measured(model: nn.Module, dense: nn.Module, node: dict[str, Any]) -> dict[str, float]:
    view = cache.open_cache({"seed": 0, "cache": False, "eval": {"speed": node}})
    owner, tokenizer = DenseModel(view, lambda: dense), ascii_tokenizer()
    itself = model if model is dense else None
    return owner.bound("speed", evals.build(node), tokenizer, itself)(model, tokenizer)


def test_a_speedup_is_of_times_taken_one_after_the_other():
    own, dense = [[1.0, 2.0], [10.0, 20.0], [1.0, 2.0]], [[2.0, 6.0], [20.0, 60.0], [4.0, 2.0]]
    assert rates(own, [10, 30]) == {"prefill_tokens_per_s": 10, "decode_tokens_per_s": 15}
    found = compared([own, dense], [10, 30])
    assert (found["prefill_speedup"], found["decode_speedup"]) == (2, 3)
    assert found["dense_prefill_tokens_per_s"] == 2.5


@pytest.mark.parametrize("type", ["f32", "q8_0"])
def test_llamacpp_measures_the_dense_model_alone_and_beside_another(type: str):
    needs("llama.cpp")
    model, node = tiny("llama"), {"name": "llamacpp", "type": type, "threads": 1, **SHORT}
    alone = measured(model, model, node)
    assert set(alone) == {f"llamacpp_{type}_{name}" for name in OWN}
    both = measured(cut(tiny("llama"), neurons=[32, 32, 32]), model, node)
    assert set(both) == {f"llamacpp_{type}_{name}" for name in OWN | BESIDE}
    assert all(value > 0 for value in both.values())
    assert both[f"llamacpp_{type}_mib"] < alone[f"llamacpp_{type}_mib"]


def test_a_model_without_a_place_in_gguf_is_skipped_with_the_reason(caplog):
    model = cut(tiny("qwen3"), neurons=[5, 0, 17])
    with caplog.at_level(logging.WARNING, logger="prunekit"):
        assert measured(model, model, {"name": "llamacpp", **SHORT}) == {}
    assert (
        "llamacpp_f16 is skipped: llama.cpp has one width for all layers of a qwen3" in caplog.text
    )


@pytest.mark.parametrize("engine", ["llamacpp", "vllm"])
def test_an_engine_that_is_not_here_is_refused_before_the_run(engine: str, monkeypatch):
    calib = calibs.build({"name": "crop", "dataset": "pydocs"})
    check = evals.build({"name": engine}).meta["check"]
    monkeypatch.setenv("PRUNEKIT_LLAMACPP", "/nowhere/python")
    monkeypatch.setenv("PRUNEKIT_VLLM", "/nowhere/python")
    with pytest.raises(ConfigError, match="/nowhere/python"):
        check(calib)
    monkeypatch.delenv("PRUNEKIT_LLAMACPP")
    monkeypatch.delenv("PRUNEKIT_VLLM")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="is not here.*PRUNEKIT_"):
        check(calib)


def test_what_an_engine_says_against_a_file_is_the_reason(caplog, monkeypatch):
    needs("llama.cpp")
    monkeypatch.setattr(
        "prunekit.evals.llamacpp.write_gguf",
        lambda model, words, out, type: Path(out).write_bytes(b"GGUF") and out,
    )
    model = tiny("llama")
    with caplog.at_level(logging.WARNING, logger="prunekit"):
        assert measured(model, model, {"name": "llamacpp", **SHORT}) == {}
    assert "llamacpp_f16 is skipped: " in caplog.text


@pytest.mark.slow
def test_vllm_measures_another_model_beside_the_dense_one():
    needs("vLLM")
    wide = {"hidden": 192, "head_dim": 32}
    model = cut(tiny("llama", **wide), heads=[1, 1, 1], neurons=[5, 0, 17])
    node = {"name": "vllm", "form": "nemotron-nas", "compiled": False, "share": 0.1, **SHORT}
    both = measured(model, tiny("llama", **wide), node)
    assert set(both) == {f"vllm_{name}" for name in OWN | BESIDE}
    assert all(value > 0 for value in both.values())
