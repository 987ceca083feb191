"""The table of engines: who takes a model, and what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import llama, uneven
from serving_models import cut, tiny, without
from torch import nn

from prunekit.checkpoint import save
from prunekit.export.command import main
from prunekit.export.engines import Engine, engines
from prunekit.models.tiny import byte_tokenizer


def row(model: nn.Module, name: str) -> Engine:
    return next(e for e in engines(model) if e.name == name)


def test_a_stock_model_is_taken_by_all() -> None:
    assert all(e.takes for e in engines(tiny("llama")))


def test_an_uneven_llama_is_taken_by_those_with_sizes_layer_by_layer() -> None:
    found = {e.name: e for e in engines(cut(tiny("llama"), heads=[1, 0, 2]))}
    assert [n for n, e in found.items() if e.takes] == ["transformers", "vLLM", "llama.cpp"]
    assert "deci" in found["llama.cpp"].how
    assert found["SGLang"].override == "pruner.kinds=[neurons]"


def test_an_uneven_feed_forward_is_taken_by_all() -> None:
    assert all(e.takes for e in engines(cut(tiny("llama"), neurons=[5, 0, 17])))


def test_what_is_missing_is_named_with_what_would_meet_it() -> None:
    gap = row(cut(tiny("qwen3"), heads=[1, 0, 2]), "llama.cpp")
    assert not gap.takes
    assert gap.override == "ratio.loadable=stock"
    assert "no attention" in row(without(tiny("qwen3"), (1, "self_attn")), "vLLM").how
    assert "nemotron-nas" in row(without(tiny("llama"), (1, "self_attn")), "vLLM").how
    assert row(without(tiny("llama"), (1, "mlp")), "vLLM").takes
    assert "experts" in row(cut(tiny("qwen3_moe"), neurons=[5, 0, 17]), "vLLM").how
    assert row(cut(tiny("mixtral"), neurons=[5, 0, 17]), "vLLM").takes


def test_a_tokenizer_that_gguf_cannot_hold_is_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    model = tiny("llama")
    assert row(model, "llama.cpp").takes
    save(model, byte_tokenizer(), tmp_path / "checkpoint")
    assert main([str(tmp_path / "checkpoint"), "--to", "list"]) == 0
    [line] = [n for n in capsys.readouterr().out.splitlines() if "llama.cpp" in n]
    assert "no" in line.split()
    assert "another tokenizer from GGUF" in line


def test_the_command_reads_no_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    save(uneven(llama()), None, tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "model.safetensors").write_bytes(b"")
    assert main([str(tmp_path / "checkpoint"), "--to", "list"]) == 0
    shown = capsys.readouterr().out
    assert "nemotron-nas" in shown
    assert "architecture deci" in shown
