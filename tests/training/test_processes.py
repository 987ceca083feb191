"""Several processes train what one does, parameters outside of the model included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

SCRIPT = """
import json, os, sys
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from test_trainer import RECIPE, UP, examples, llama
from dataclasses import replace
from prunekit.training.distillation import Distillation
from prunekit.training.trainer import train

rank = int(os.environ.get("RANK", "0"))
# Each process pulls the second number its own way: down by 3 in the first, up by 1 in the other.
pull = torch.tensor([1.0, 3.0 if rank == 0 else -1.0])
z, model = nn.Parameter(torch.zeros(2)), llama()
sharded = []
outside = {
    "penalty": lambda model, step: (pull * z).sum() - (pull * z).sum().detach() + 5,
    "parameters": [{"params": [z], "lr": 0.5, "constant": True}],
}
inside = {
    "penalty": lambda model, step: sharded.append(shards_of(model)) or torch.zeros(()),
    "validation": examples(4),  # of 11, 10, 9 and 8 labels
}


def shards_of(model):
    return sum(isinstance(p, DTensor) for p in model.parameters())


mask = torch.arange(24 * 16).view(24, 16) % 2 == 0
history = train(
    model,
    examples(8),
    replace(RECIPE, max_steps=2),
    keep={UP: mask},
    teacher=llama(1),
    distillation=Distillation(0.5, 2.0),
    **(outside if sys.argv[2] == "outside" else inside),
)
weights = torch.cat([p.detach().flatten() for p in model.parameters()])
found = {
    "curve": history.curve,
    "z": z.tolist(),
    "zeros": not model.get_parameter(UP)[~mask].any(),
    "weights": weights.double().norm().item(),
    "weight": weights.double().abs().sum().item(),
    "sharded": max(sharded, default=0),
    "left": shards_of(model) + len(type(model).__name__.split("FSDP")) - 1,
}
open(f"{sys.argv[1]}.{rank}.json", "w").write(json.dumps(found))
"""


def run(out: Path, trained: str, *launcher: str) -> None:
    here = Path(__file__).parent
    paths = os.pathsep.join(map(str, (ROOT, here, here.parent)))
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    script = out.parent / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, *launcher, str(script), str(out), trained]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(tmp_path):
    run(tmp_path / "one", "outside")
    run(
        tmp_path / "two",
        "outside",
        *"-m torch.distributed.run --nproc_per_node=2 --standalone".split(),
    )
    one, first, second = (
        json.loads((tmp_path / name).read_text())
        for name in ("one.0.json", "two.0.json", "two.1.json")
    )
    assert first["z"] == second["z"] == pytest.approx([-1.0, -1.0], abs=1e-4)
    assert first["weights"] == second["weights"] == pytest.approx(one["weights"], rel=1e-5)
    assert one["zeros"]
    assert first["zeros"]
    for a, b in zip(one["curve"], first["curve"], strict=True):
        assert a == pytest.approx(b, rel=1e-3)


@pytest.mark.slow
def test_two_processes_with_shards_of_the_model_take_the_step_of_one(tmp_path):
    """Teacher and student in shards (FSDP2 by `accelerate launch`), zeros held, the best step."""
    config = str(ROOT / "conf/accelerate/fsdp2_cpu.yaml")
    run(tmp_path / "one", "inside")
    run(tmp_path / "two", "inside", *"-m accelerate.commands.launch --config_file".split(), config)
    one, first, second = (
        json.loads((tmp_path / name).read_text())
        for name in ("one.0.json", "two.0.json", "two.1.json")
    )
    assert one["sharded"] == 0
    assert first["sharded"] > 0
    assert first["left"] == 0
    assert first["zeros"]
    for key in ("weights", "weight"):
        assert first[key] == second[key] == pytest.approx(one[key], rel=1e-5)
    for a, b in zip(one["curve"], first["curve"], strict=True):
        assert a == pytest.approx(b, abs=1e-4)
