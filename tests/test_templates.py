"""The templates of CONTRIBUTING.md and the README's criterion, each one Python file and one YAML,
put into a copy of the package and run.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT
from templates import EXAMPLE, PLURALS, TEMPLATES, add, copy_of_the_package, environment


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The package, its configuration, all templates and the README's criterion."""
    top = copy_of_the_package(tmp_path_factory.mktemp("copy"))
    add(top, TEMPLATES | EXAMPLE)
    return top


def prunekit(top: Path, *words: str) -> subprocess.CompletedProcess[str]:
    asked = [sys.executable, "-m", "prunekit", *words]
    return subprocess.run(asked, cwd=top, env=environment(top), capture_output=True, text=True)


def test_each_kind_has_a_template():
    for kind, package in PLURALS.items():
        python = [p for p in TEMPLATES if p.startswith(f"prunekit/{package}/")]
        assert len(python) == 1, kind
        assert f"conf/{kind}/{Path(python[0]).stem}.yaml" in TEMPLATES
    assert len(TEMPLATES) == 2 * len(PLURALS)


def test_they_are_listed(copy):
    done = prunekit(copy, "list")
    assert done.returncode == 0, done.stderr
    for path in TEMPLATES | EXAMPLE:
        assert Path(path).stem in done.stdout


def test_one_run_of_all_of_them(copy, tmp_path):
    from prunekit.registry import models

    model, tokenizer = models.build({"name": "tiny_llama", "layers": 6})()
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    done = prunekit(
        copy,
        *("model=truncated", f"model.path={tmp_path / 'dense'}", "model.layers=5"),
        *("calib=random_tokens", "calib.samples=4", "calib.length=16"),
        *("criterion=input_energy", "ratio=ramp", "exclude=every", "pruner=backwards"),
        *("recovery=vectors", "recovery.steps=3", "eval=quick", "+eval@eval.entropy=entropy"),
        *("track=silent", "cache=off", f"hydra.run.dir={tmp_path / 'out'}"),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    # Of five blocks the first and the last are left alone; shares 0.1 at block 0 to 0.3 at block 3.
    assert {n: k for n, (k, _) in found["kept"].items()} == {
        "neurons.1": 128 - 21,
        "neurons.2": 128 - 29,
        "neurons.3": 128 - 38,
    }
    numbers = found["results"]
    assert 0 < numbers["recovered/entropy_nats"] < numbers["dense/entropy_nats"] * 1.5
    assert numbers["recovered/ppl_pydocs_32"] != numbers["pruned/ppl_pydocs_32"]
    assert numbers["recovered/params"] == numbers["pruned/params"] < numbers["dense/params"]


def test_the_readmes_criterion_runs(copy, tmp_path):
    assert len(EXAMPLE) == 2
    tiny = ["model=tiny_llama", "exclude=none", "eval=quick", "track=silent", "save=false"]
    done = prunekit(copy, *tiny, "criterion=weight_spread", f"hydra.run.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "result.json").read_text())["results"]
    assert found["pruned/params"] < 0.81 * found["dense/params"]


def test_they_keep_the_house_style(copy):
    if importlib.util.find_spec("ruff") is None:
        pytest.skip("needs ruff")
    files = [path for path in TEMPLATES | EXAMPLE if path.endswith(".py")]
    shutil.copy(ROOT / "pyproject.toml", copy)
    for asked in (["check"], ["format", "--check"]):
        words = [sys.executable, "-m", "ruff", *asked, *files]
        done = subprocess.run(words, cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


REFUSED = {
    "criterion": ({"name": "input_energy", "over": "median"}, "'sum' or 'max'"),
    "exclude": ({"name": "every", "n": 0}, "greater than 0"),
    "pruner": ({"name": "backwards", "kinds": ["blocks"]}, "'neurons' or 'heads'"),
    "ratio": ({"name": "ramp", "last": 1.0}, "less than 1"),
    "recovery": ({"name": "vectors", "epochs": 3}, "Options: steps, lr"),
}
BUILD = """
import json, sys
from prunekit.errors import ConfigError
from prunekit.registry import REGISTRIES
for kind, (node, _) in json.loads(sys.argv[1]).items():
    try:
        REGISTRIES[kind].build(node)
    except ConfigError as e:
        print(kind, e)
"""


def test_their_options_are_checked(copy):
    asked = [sys.executable, "-c", BUILD, json.dumps(REFUSED)]
    env = environment(copy)
    done = subprocess.run(asked, env=env, cwd=copy, capture_output=True, text=True, check=True)
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    for kind, (_, message) in REFUSED.items():
        assert message in said[kind]
