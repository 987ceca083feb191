"""Components in a folder outside of the package, which PRUNEKIT_COMPONENTS names."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT
from templates import EXAMPLE, TEMPLATES, environment

from prunekit import source
from prunekit.cli.compose import composed
from prunekit.cli.paths import conf_dirs
from prunekit.cli.suggestions import chosen_wrong
from prunekit.errors import ConfigError

TINY = ["model=tiny_llama", "model.layers=2", "calib.samples=4", "calib.length=16"]
TINY += ["exclude=none", "eval=quick", "track=silent", "save=false"]
OWN = ["criterion=weight_spread", "pruner=backwards"]


def write(top: Path, files: dict[str, str]) -> Path:
    for path, text in files.items():
        place = top / path.removeprefix("prunekit/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    return top


def prunekit(top: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    asked = [sys.executable, "-m", "prunekit", *words]
    env = environment(ROOT, PRUNEKIT_COMPONENTS=str(top), PRUNEKIT_CACHE=str(cwd / "cache"))
    return subprocess.run(asked, cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    """The templates and the README's criterion, outside of the package."""
    top = write(tmp_path / "mine", TEMPLATES | EXAMPLE)
    monkeypatch.setenv("PRUNEKIT_COMPONENTS", str(top))
    return top


def test_a_sweep_runs_with_them_and_knows_when_their_code_changed(own, tmp_path):
    sweep = [*TINY, *OWN, "-m", "seed=0,1", "hydra.sweep.dir=out"]
    for edit, done_before in ((None, 0), (None, 2), ("# changed\n", 0)):
        if edit:
            file = own / "criteria" / "weight_spread.py"
            file.write_text(file.read_text() + edit)
        ran = prunekit(own, tmp_path, *sweep)
        assert ran.returncode == 0, ran.stderr
        assert f"2 jobs, {done_before} finished before" in ran.stdout + ran.stderr
    found = json.loads((tmp_path / "out" / "seed=0" / "result.json").read_text())
    assert found["results"]["pruned/params"] < found["results"]["dense/params"]
    assert found["notes"]["counts"]  # what the template of a pruner leaves behind


def test_they_are_listed_suggested_and_composed_beside_prunekits_own(own, tmp_path):
    said = prunekit(own, tmp_path, "list", "criterion").stdout
    assert "weight_spread" in said
    assert "wanda_sp" in said
    assert "criterion=weight_spread" in chosen_wrong("criterion", "weight_spred")
    (cfg,) = composed([*TINY, *OWN])
    assert cfg["pruner"] == {"name": "backwards", "kinds": ["neurons"]}
    file = own / "criteria" / "weight_spread.py"
    assert source.module_file("prunekit.criteria.weight_spread") == file


REFUSED = {
    "a component": ("criteria/mine.py", "@criteria.register()\ndef taylor(model): ...\n", "taylor"),
    "a file": ("criteria/taylor.py", "x = 1\n", "has a 'taylor.py' already; call yours otherwise"),
    "no Python": ("criteria/mine.py", "x = 1\ndef f(:\n", r"mine\.py, line 2: invalid syntax"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_cannot_stand_beside_prunekits_are_named(case, tmp_path, monkeypatch):
    path, text, message = REFUSED[case]
    monkeypatch.setenv("PRUNEKIT_COMPONENTS", str(write(tmp_path, {path: text})))
    with pytest.raises(ConfigError, match=message):
        source.components("criteria")


def test_a_yaml_that_prunekit_has_is_refused(tmp_path, monkeypatch):
    write(tmp_path, {"conf/criterion/taylor.yaml": "name: taylor\n"})
    monkeypatch.setenv("PRUNEKIT_COMPONENTS", str(tmp_path))
    with pytest.raises(ConfigError, match=r"taylor\.yaml: prunekit has that YAML"):
        conf_dirs()


def test_a_folder_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNEKIT_COMPONENTS", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"PRUNEKIT_COMPONENTS=.*none is no folder"):
        source.tops()
