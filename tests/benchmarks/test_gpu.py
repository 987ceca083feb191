"""What `make gpu` runs where there is a GPU, on tiny shapes where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from paths import ROOT

from prunekit.models.tiny import tiny_llama
from prunekit.registry import criteria, pruners, ratios

SCRIPT = ROOT / "benchmarks" / "gpu.py"
ONE_OF_EACH = (
    "device, linear algebra",
    "CPU = GPU, (laser|copal|unstructured, wanda)$",
    "kernels, ",
    "training, (distill|reconstruct)$",
    "checkpoint, ",
    "streamed, ",
    "determinism, ",
    "latency, 1.1B, batch 1",
    "1.1B shape, (sparsegpt|oneshot, taylor)$",
    "discovery, gpt2",
    "real model, oneshot, taylor",
    "real, CPU = GPU, unstructured, wanda",
)
"""Rows that meet every function of the script in a few seconds."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model in place of the real one."""
    path = tmp_path_factory.mktemp("real")
    model, tokenizer = tiny_llama(device="cpu")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def rows(folder: Path, only: str) -> dict[str, str]:
    """Row -> what was found, on the page that a run on the CPU writes; every row is `ok`."""
    page, log = folder / "gpu.md", folder / "gpu.log"
    words = ["--real", folder, "--only", only, "--out", page, "--log", log, "--budget", "500"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DEVICE": "cpu"}
    done = subprocess.run(
        [sys.executable, SCRIPT, *map(str, words)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:] + log.read_text()
    lines = [line.strip("| ").split(" | ") for line in page.read_text().splitlines()]
    table = [cells for cells in lines if len(cells) == 6 and cells[0] != "| what"]
    assert {cells[2] for cells in table} == {"ok"}
    return {f"{cells[0]}, {cells[1]}": cells[5] for cells in table}


def test_one_row_of_each_sort_passes_on_a_cpu(folder):
    found = rows(folder, "|".join(f"^{one}" for one in ONE_OF_EACH))
    assert len(found) == 21
    in_turn = [v for k, v in found.items() if k.startswith("streamed, ")]
    assert all("100.00% of" in v and "logits 0e+00" in v for v in in_turn)
    for run in ("a run", "elements"):
        assert found[f"determinism, {run} twice"].endswith(" bytes, the same")
    assert found["CPU = GPU, unstructured, wanda"].startswith("100.00% of ")
    assert found["kernels, 2:4, semi-structured"].startswith("0 of 29 converted, logits 0e+00")
    zeros = found["training, distill"].partition("; zeros ")[2].split(" -> ")
    assert zeros[0] == zeros[1] != "0"


@pytest.mark.slow
def test_every_row_passes_on_a_cpu(folder):
    rows(folder, "")


@pytest.fixture
def script(monkeypatch):
    """The script as a module; what it sets for a process of its own is undone."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    import gpu

    return gpu


def test_every_method_that_is_registered_has_a_row(script):
    """But learned masks, which no two devices draw alike."""
    from gpu_methods import LEARNED

    assert set(LEARNED) < set(pruners.names())
    every = list(script.methods())
    names = [m.name for m in every]
    assert len(set(names)) == len(names)
    assert {m.pruner["name"] for m in every} == set(pruners.names()) - set(LEARNED)
    assert {m.criterion["name"] for m in every if m.criterion} == set(criteria.names())
    assert {m.ratio["name"] for m in every if m.ratio} == set(ratios.names())


def test_a_check_that_fails_or_hangs_is_a_row_and_the_rest_goes_on(script, tmp_path):
    def breaks(bench):
        raise RuntimeError("no such\nkernel")

    def hangs(bench):
        while True:
            pass

    bench, log = script.Bench(torch.device("cpu"), small=True), tmp_path / "log"
    broken = script.attempt(script.Check("a", "b", breaks), bench, 5, log)
    assert broken.line() == "| a | b | FAILED | 0.0 | - | RuntimeError: no such kernel |"
    assert "in breaks" in log.read_text()
    late = script.attempt(script.Check("a", "c", hangs), bench, 0.05, log)
    assert (late.status, late.found) == ("FAILED", "TimeoutError: more than 0 s")
    assert script.attempt(script.Check("a", "d", lambda b: "fine"), bench, 5, log).status == "ok"


def test_what_the_budget_leaves_out_is_said(script, tmp_path):
    page, log = tmp_path / "gpu.md", tmp_path / "gpu.log"
    words = ["--device", "cpu", "--budget", "0", "--only", "linear", "--log", str(log)]
    assert script.main([*words, "--out", str(page)]) == 0
    assert "| device | linear algebra | not run | 0.0 | - |  |" in page.read_text()
    assert "0 checks passed, 0 failed, 1 were not run" in page.read_text()


def test_packages_older_than_prunekit_asks_for_are_named(script, monkeypatch, tmp_path, capsys):
    true = script.version
    old = {"lm-eval": "0.4.1"}
    monkeypatch.setattr(script, "version", lambda name: old.get(name) or true(name))
    page, log = tmp_path / "gpu.md", tmp_path / "gpu.log"
    words = ["--device", "cpu", "--budget", "0", "--only", "linear", "--log", str(log)]
    assert script.main([*words, "--out", str(page)]) == 0
    said = "may fail by lm-eval 0.4.1 (prunekit asks for >=0.4.9)"
    assert said in page.read_text()
    assert said in capsys.readouterr().out


def test_only_a_whole_run_on_a_gpu_writes_the_page_of_the_docs(script, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    out = {w: script.options(w.split()).out for w in ("--device cuda", "--device cpu")}
    assert out == {"--device cuda": ROOT / "docs/gpu.md", "--device cpu": ROOT / "build/gpu.md"}
    assert script.options(["--device", "cuda", "--only", "obs"]).out == ROOT / "build/gpu.md"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_without_cuda_the_command_says_what_to_do(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--device", "cuda"])
    assert "there is no CUDA here; DEVICE=cpu runs everything" in capsys.readouterr().err
