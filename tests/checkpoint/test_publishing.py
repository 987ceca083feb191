"""A checkpoint's folder appears when it is complete: after an error or a kill, all is as it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import llama, uneven

from prunekit import registry
from prunekit.checkpoint import load, save, writer
from prunekit.errors import ConfigError


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="not overwritten"):
        save(llama(), None, tmp_path / "out")
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"
    save(llama(), None, tmp_path / "good")
    save(uneven(llama()), None, tmp_path / "good")
    load(tmp_path / "good")


@pytest.mark.parametrize("packed", [False, True])
def test_whoever_may_read_the_folder_may_read_its_files(tmp_path: Path, packed: bool) -> None:
    before = os.umask(0o027)
    try:
        save(llama(), None, tmp_path / "out", packed=packed)
    finally:
        os.umask(before)
    modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "out").rglob("*")}
    assert set(modes.values()) == {0o640}


def test_a_failed_write_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: torch.Tensor
) -> None:
    model = llama()
    save(model, None, tmp_path / "out")

    def full(*args: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(writer, "write_manifest", full)
    with pytest.raises(OSError, match="no space"):
        save(uneven(llama()), None, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "out")[0](tokens).logits, model(tokens).logits)


def test_a_killed_write_never_looks_complete(tmp_path: Path) -> None:
    code = """
import sys, os, time
from prunekit import save
from checkpoints import llama
def slow(handle):
    print("writing", flush=True)
    time.sleep(60)
os.fsync = slow
save(llama(), None, sys.argv[1])
"""
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}
    run = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert run.stdout is not None
    assert run.stdout.readline().strip() == b"writing"
    time.sleep(0.1)
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdout.close()
    assert not (tmp_path / "out").exists()
    save(llama(), None, tmp_path / "out")
    load(tmp_path / "out")


def test_a_tokenizer_is_written_the_same_wherever_it_was_read_from(tmp_path: Path) -> None:
    _, tokenizer = registry.models.build({"name": "tiny_llama", "layers": 1})()
    save(llama(), tokenizer, tmp_path / "first")
    save(llama(), load(tmp_path / "first")[1], tmp_path / "second")
    names = {p.name for p in (tmp_path / "first").glob("*token*")}
    assert {"tokenizer.json", "tokenizer_config.json"} <= names
    for name in names:
        first, second = ((tmp_path / f / name).read_bytes() for f in ("first", "second"))
        assert first == second, name
