"""The files that travel with a checkpoint stand for themselves."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import torch
from checkpoints import llama, uneven
from safetensors.torch import save_file

from prunekit import graph
from prunekit.checkpoint import save
from prunekit.checkpoint.remote_code import runtime_modules


def test_loads_where_prunekit_cannot_be_imported(tmp_path: Path, tokens: torch.Tensor) -> None:
    plain = llama()
    graph.remove(
        plain,
        {
            g.name: torch.arange(g.units) % 3 != 0
            for g in graph.discover(plain)
            if g.kind in ("neurons", "heads")
        },
    )
    for name, model in (("code", uneven(llama())), ("stock", plain)):
        save(model, None, tmp_path / name)
        with torch.no_grad():
            save_file(
                {"tokens": tokens, "logits": model(tokens).logits}, tmp_path / f"{name}.safetensors"
            )
    code = """
import sys
sys.modules["prunekit"] = None
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
for name, flags in (("stock", {}), ("code", {"trust_remote_code": True})):
    model = AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/{name}", **flags)
    seen = load_file(f"{sys.argv[1]}/{name}.safetensors")
    with torch.no_grad():
        assert torch.equal(model(seen["tokens"]).logits, seen["logits"]), name
"""
    env = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    env.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_carried_files_import_nothing_of_prunekit() -> None:
    for file in Path(runtime_modules.__file__).parent.glob("*.py"):
        tree = ast.parse(file.read_text())
        names = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level]
        names += [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
        tops = {str(name).partition(".")[0] for name in names}
        assert tops <= {"__future__", "copy", "typing", "torch", "transformers"}
        assert len(file.read_text().splitlines()) < 300
