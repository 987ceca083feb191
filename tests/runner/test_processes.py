"""Recovery on several processes (torchrun, gloo on the CPU) learns what one process learns, and one
of them writes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from choices import WHOLE

ROOT = Path(__file__).resolve().parents[2]
WORDS = [
    "model=tiny_llama",
    "exclude=none",
    "eval=quick",
    "track=silent",
    "save=false",
    "cache=off",
    "recovery=lora_text",
]
# Dropout draws differently in each process; without it the steps are the same sums.
WORDS += [
    f"recovery.{o}"
    for o in (
        "dropout=0",
        "max_steps=5",
        "batch=8",
        "micro_batch=2",
        "log_every=1",
        "max_length=64",
    )
]
ON_DISK = "{model.embed_tokens:cpu,model.layers.0:cpu,model.layers.1:disk,model.norm:cpu,"
ON_DISK += "model.rotary_emb:cpu,lm_head:cpu}"


def train(folder: Path, *launcher: str) -> dict:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launcher, "-m", "prunekit", *WORDS, f"hydra.run.dir={folder}"]
    done = subprocess.run(
        command, cwd=folder.parent, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((folder / "result.json").read_text())


@pytest.mark.slow
def test_two_processes_have_the_loss_of_one(tmp_path):
    one = train(tmp_path / "one")
    two = train(
        tmp_path / "two", "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29531"
    )
    losses = [[e["loss"] for e in r["notes"]["recovery_curve"] if "loss" in e] for r in (one, two)]
    assert len(losses[0]) == len(losses[1]) >= 5
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert one["results"]["recovered/ppl_pydocs_32"] == pytest.approx(
        two["results"]["recovered/ppl_pydocs_32"], rel=1e-3
    )
    assert len(list(tmp_path.rglob("two/**/result.json"))) == 1


@pytest.mark.slow
def test_two_processes_choose_what_one_does(tmp_path):
    """A method of each family on samples that are shared out: gradients (of the whole model, and
    block by block), moments, grams with a refit, levels of databases, block influence, experts.
    Others see the whole text in each process. Of single weights a few are so nearly equal that the
    order of sums decides.
    """
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29533"]
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launcher, str(ROOT / "tests" / "choices.py"), str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = torch.load(tmp_path / "alone.pt")
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found.keys() == expected.keys()
        for name, (kept, tokens) in expected.items():
            theirs, seen = found[name]
            for group, mask in kept.items():
                same = (theirs[group] == mask).float().mean()
                assert same > 0.999 if mask.dim() > 1 else same == 1, (name, group)
            if name in WHOLE:
                assert seen == tokens > 0, f"{name}: each process sees the whole text"
            # OBS stops its forwards before that layer ends, SparseLLM's turns see the whole text.
            elif name not in ("obs", "sparsellm"):
                assert 0 < seen < tokens, f"{name}: a process sees a part of the text"


@pytest.mark.slow
def test_a_model_spread_by_accelerate_gives_the_same_numbers(tmp_path):
    from prunekit import registry
    from prunekit.cli.compose import composed
    from prunekit.runner.run import run

    model, tokenizer = registry.models.build({"name": "tiny_llama", "layers": 2, "device": "cpu"})()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = [
        "model=hf",
        f"model.path={tmp_path / 'model'}",
        "exclude=none",
        "eval=quick",
        "track=silent",
        "save=false",
        "cache=off",
    ]
    found = {}
    for name, place in (
        ("plain", "model.device=cpu"),
        ("spread", f"model.device_map={ON_DISK}"),
    ):
        (cfg,) = composed(
            [*words, place, "recovery=lora_text", "recovery.max_steps=2", "recovery.max_length=32"]
        )
        found[name] = run(cfg, tmp_path / name)
    plain, spread = found["plain"]["results"], found["spread"]["results"]
    assert spread.items() <= plain.items()
    assert plain.keys() - spread.keys() == {"dense/params_nonzero"}  # weights on disk: not counted
    assert found["plain"]["kept"] == found["spread"]["kept"]
