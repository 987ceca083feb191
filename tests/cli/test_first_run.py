"""What the first run prints is ours: stages, bars that say their unit, the table."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys

import pytest
from paths import ROOT

from prunekit.registry import models

WORDS = [
    "experiment=demo",
    "model=hf",
    "exclude=none",
    "track=silent",
    "calib.samples=4",
]
WORDS += [
    "recovery.max_steps=2",
    "recovery.warmup_steps=0",
    "recovery.max_length=32",
    "eval.latency.repeats=2",
]
WORDS += ["eval.ppl.limit=4", "eval.zeroshot.limit=2"]
STAGES = r"loading the model|pruning|recovering|writing the checkpoint"
STAGES += r"|stage \w+ is kept: \d+ MiB in .*|(dense|pruned|recovered): measuring \w+"
BARS = {
    "latency": "request",
    "ppl_pydocs_128": "window",
    "Building requests": "item",
    "Tokenizing inputs": "input",
    "Running loglikelihood requests": "request",
    "gradients": " samples",
    "training": " steps",
}
TABLE = (
    r"[┏┡└].*[┓┩┘]|[┃│].*[┃│]|(checkpoint|log|result)  +/.*|/.*, taylor, 20% of model, recovery \w+"
)


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> tuple[list[str], list[str]]:
    """Lines of stdout and of stderr, each state of a bar a line of its own."""
    folder = tmp_path_factory.mktemp("first")
    model, tokenizer = models.build({"name": "tiny_llama", "layers": 2})()
    model.save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    # transformers prints a line about this one when it is imported
    inherited = {k: v for k, v in os.environ.items() if k != "WANDB_MODE"}
    env = inherited | {"PYTHONPATH": str(ROOT), "PRUNEKIT_CACHE": str(folder), "COLUMNS": "200"}
    asked = [sys.executable, "-m", "prunekit", *WORDS, f"model.path={folder / 'dense'}"]
    done = subprocess.run(asked, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out, err = (re.split(r"[\r\n]+", text) for text in (done.stdout, done.stderr))
    return [x for x in out if x.strip()], [x.strip() for x in err if x.strip()]


def test_every_line_of_a_first_run_is_ours(printed):
    out, err = printed
    assert [line for line in out if not re.fullmatch(TABLE, line)] == []
    bars = "|".join(rf"{desc}: .*{unit}\W.*" for desc, unit in BARS.items())
    assert [line for line in err if not re.fullmatch(rf"{STAGES}|{bars}", line)] == []


def test_what_a_first_run_does_is_said_in_order(printed):
    stages = [line for line in printed[1] if re.fullmatch(STAGES, line)]
    assert stages[0] == "loading the model"
    assert stages[-1] == "writing the checkpoint"
    assert stages.index("dense: measuring ppl") < stages.index("pruning")
    assert stages.index("recovering") < stages.index("recovered: measuring ppl")
    assert {line.partition(":")[0] for line in printed[1]} > set(BARS)


def test_every_bar_names_its_unit():
    bars = 0
    for path in sorted((ROOT / "prunekit").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "tqdm":
                bars += 1
                options = {k.arg for k in node.keywords}
                assert "desc" in options, f"{path}:{node.lineno}"
                assert options & {"unit", "bar_format"}, f"{path}:{node.lineno}"
    assert bars > 10
