"""A new component is one file and one YAML: it runs, and nobody who does not use it computes
anything anew.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from templates import add, copy_of_the_package, environment, files_of

TINY = ["model=tiny_llama", "model.layers=2", "calib.samples=4", "calib.length=16"]
TINY += ["exclude=none", "eval=quick", "track=silent", "save=false"]
OLD = {
    "plain": [],
    "layerwise": ["pruner=layerwise", "criterion=wanda_sp"],
    "obs": ["pruner=obs", "criterion=none", "ratio=cost"],
    "lora": ["recovery=lora_text"],
}
NEW = {
    "ratio": ["ratio=ramp"],
    "pruner": ["pruner=backwards"],
    "recovery": ["recovery=vectors", "recovery.steps=2"],
    "criterion": ["criterion=input_energy"],
}
RAN = ["plain", *NEW]
DRIVER = """
import json, sys
from pathlib import Path
from prunekit.cli.compose import composed
from prunekit.runner.resume import code_version, finished

found, configs, run_too = {}, *json.loads(sys.argv[1])
for name, cfg in configs.items():
    if isinstance(cfg, list):
        (cfg,) = composed(cfg)
    code = code_version(cfg)
    found[name] = {"config": cfg, "code": code, "finished": finished(Path(name), cfg)}
    if name in run_too:
        from prunekit.runner.run import run
        record = run(cfg, name)
        found[name] |= {k: record[k] for k in ("results", "kept")}
        found[name]["cached"] = json.loads(Path(name, "result.json").read_text())["cached"]
print(json.dumps(found))
"""


def ask(top: Path, configs: dict[str, Any], run_too: list[str]) -> dict[str, Any]:
    """Of each configuration, composed if it is a list of words, the hash of its code, and whether
    its result counts as finished; of those that run then their results.
    """
    given = json.dumps([configs, run_too])
    env = environment(top, PRUNEKIT_CACHE=str(top / "cache"))
    asked = [sys.executable, "-c", DRIVER, given]
    done = subprocess.run(asked, cwd=top, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def story(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """What is found before four components are added, after that, and after a line of one of them
    has changed.
    """
    top = copy_of_the_package(tmp_path_factory.mktemp("copy"))
    words = {name: [*TINY, *said] for name, said in (OLD | NEW).items()}
    found = {"before": ask(top, {name: words[name] for name in OLD}, ["plain"])}
    for kind in NEW:
        files = files_of(kind)
        assert sorted(Path(path).suffix for path in files) == [".py", ".yaml"]
        add(top, files)
    found["added"] = ask(top, words, RAN)
    configs = {name: found["added"][name]["config"] for name in words}
    for kind in NEW:
        (python,) = (top / path for path in files_of(kind) if path.endswith(".py"))
        python.write_text(python.read_text() + "# changed\n")
        found[kind] = ask(top, configs, ["criterion"] if kind == "criterion" else [])
        python.write_text(python.read_text().removesuffix("# changed\n"))
    return found


def test_each_runs_and_is_what_ran(story):
    found = story["added"]
    plain = found["plain"]
    for kind in ("criterion", "ratio", "pruner"):
        assert found[kind]["kept"].keys() <= plain["kept"].keys(), kind
        assert found[kind]["results"]["pruned/params"] < plain["results"]["dense/params"], kind
        numbers = found[kind]["results"], plain["results"]
        assert len({n["pruned/ppl_pydocs_32"] for n in numbers}) == 2, kind
    recovered = found["recovery"]["results"]
    assert recovered["pruned/ppl_pydocs_32"] == plain["results"]["pruned/ppl_pydocs_32"]
    assert recovered["recovered/ppl_pydocs_32"] < recovered["pruned/ppl_pydocs_32"]


def test_adding_them_invalidates_nothing(story):
    before, added = story["before"], story["added"]
    assert not before["plain"]["finished"]
    assert added["plain"]["finished"]
    assert {"dense/ppl", "score"} <= set(added["plain"]["cached"])
    assert added["plain"]["kept"] == before["plain"]["kept"]
    assert {n: added[n]["code"] for n in OLD} == {n: before[n]["code"] for n in OLD}


@pytest.mark.parametrize("kind", NEW)
def test_changing_one_concerns_those_that_use_it(story, kind):
    added, changed = story["added"], story[kind]
    differs = {n for n in OLD | NEW if changed[n]["code"] != added[n]["code"]}
    assert differs == {kind}
    assert {n for n in RAN if not changed[n]["finished"]} == {kind}


def test_scores_of_a_changed_criterion_are_computed_anew(story):
    cached = story["criterion"]["criterion"]["cached"]
    assert "dense/ppl" in cached
    assert "score" not in cached
