"""The runner and the command line on a tiny model: what is written, what fails, and when."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from compositions import TINY, config

from prunekit import registry
from prunekit.errors import ConfigError
from prunekit.registry import models
from prunekit.runner.run import run

LAYERS = range(4)
EVENLY = {f"heads.{i}": 2 for i in LAYERS} | {"neurons.0": 80}
EVENLY |= {f"neurons.{i}": 81 for i in (1, 2, 3)}


def test_result_file_has_every_documented_part(tmp_path):
    record = run(config(), tmp_path)
    on_disk = json.loads((tmp_path / "result.json").read_text())
    assert on_disk["results"] == record["results"]
    assert {
        "dense/ppl_pydocs_32",
        "pruned/ppl_pydocs_32",
        "dense/params",
        "pruned/params",
    } <= on_disk["results"].keys()
    share = 1 - on_disk["results"]["pruned/params"] / on_disk["results"]["dense/params"]
    assert share == pytest.approx(0.2, abs=0.01)
    assert on_disk["stages"]["prune"]["seconds"] > 0
    assert on_disk["stages"]["prune"]["peak_memory_mib"] > 0
    assert on_disk["provenance"]["calibration"]["shape"] == [4, 16]
    assert len(on_disk["provenance"]["calibration"]["sha256"]) == 64
    assert on_disk["provenance"]["seed"] == 42
    assert all(kept <= of for kept, of in on_disk["kept"].values())
    assert not list(tmp_path.glob("*.tmp"))


def test_the_same_command_twice_gives_the_same_bits(tmp_path):
    a, b = (run(config("cache=off"), tmp_path / name) for name in "ab")
    timed = ("_ms", "_ms_per_token", "_per_s", "_mib", "_ms_spread", "_spread")
    stable = [k for k in a["results"] if not k.endswith(timed)]
    assert {k: a["results"][k] for k in stable} == {k: b["results"][k] for k in stable}
    assert a["kept"] == b["kept"]
    assert a["importance"] == b["importance"]


def test_ratio_zero_changes_nothing(tmp_path):
    found = run(config("ratio.target=0"), tmp_path)["results"]
    assert found["pruned/ppl_pydocs_32"] == found["dense/ppl_pydocs_32"]
    assert found["pruned/params"] == found["dense/params"]


@pytest.mark.parametrize("criterion", ["taylor", "l1", "l2", "random"])
def test_every_criterion_of_the_paper_runs(criterion, tmp_path):
    found = run(config(f"criterion={criterion}", "save=false"), tmp_path)["results"]
    assert found["pruned/params"] < found["dense/params"]


@pytest.mark.parametrize(
    ("overrides", "left", "kept"),
    [
        (["pruner=channel", "pruner.norm=rescale"], 0.8, {"hidden": 51}),
        (["ratio=global"], 0.8, None),
        (["ratio=global", "ratio.of=units"], None, None),
        (["pruner.steps=3"], 0.8, EVENLY),
        (["pruner.grouping=none"], 0.8, None),
        (["pruner.remove=false"], 0.8, EVENLY),
        (
            ["exclude=range", "exclude.heads=[0,1]", "exclude.neurons=[1,2]", "ratio.of=prunable"],
            None,
            {"heads.0": 2, "neurons.1": 90},
        ),
        (
            ["ratio.of=units", "ratio.target=0.4"],
            None,
            EVENLY | {f"neurons.{i}": 76 for i in LAYERS},
        ),
    ],
)
def test_every_strategy_takes_what_it_is_told_to_and_saves(overrides, left, kept, tmp_path):
    """Of 2 x 4 heads and 128 neurons in each of 4 layers."""
    record = run(config(*overrides), tmp_path)
    size = "params_nonzero" if "pruner.remove=false" in overrides else "params"
    share = record["results"][f"pruned/{size}"] / record["results"][f"dense/{size}"]
    assert share < 1
    assert left is None or share == pytest.approx(left, abs=0.005)
    found = {name: n for name, (n, _) in record["kept"].items()}
    assert kept is None or found == kept
    neurons = [n for name, n in found.items() if name.startswith("neurons.")]
    if "ratio=global" in overrides:
        assert max(neurons) - min(neurons) > 10
        assert "ratio.of=units" not in overrides or sum(neurons) == 4 * 128 - int(0.2 * 128 + 1) * 4
    assert (tmp_path / "checkpoint" / "config.json").is_file()


@pytest.mark.parametrize(
    ("node", "value", "says"),
    [
        ("ratio.target", 1.2, "less than 1"),
        ("criterion.name", "tailor", "Did you mean 'taylor'"),
        ("criterion.mode", "param_third", "param_first"),
        ("exclude.first", 2, "no option 'first'"),
        ("pruner.kinds", ["wheels"], "neurons"),
    ],
)
def test_what_is_wrong_is_said_before_a_weight_is_read(node, value, says, tmp_path, monkeypatch):
    monkeypatch.setattr("prunekit.models.tiny.tiny_llama", None)
    cfg = config()
    group, key = node.split(".")
    cfg[group] = cfg[group] | {key: value}
    with pytest.raises(ConfigError, match=says):
        run(cfg, tmp_path)
    assert not (tmp_path / "result.json").exists()


def test_text_that_is_too_short_is_said_before_a_folders_weights_are_read(tmp_path, monkeypatch):
    model, tokenizer = models.build({"name": "tiny_llama", "layers": 2})()
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    (tmp_path / "short.txt").write_text("too short")
    own = ["model=hf", f"model.path={tmp_path / 'dense'}", "calib=text"]
    own += [f"calib.path={tmp_path / 'short.txt'}", "calib.length=4"]
    monkeypatch.setattr("prunekit.models.hf._read", lambda *_: pytest.fail("weights are read"))
    with pytest.raises(ConfigError, match="there are 2 of that length"):
        run(config(*own), tmp_path / "out")


def test_an_exclusion_that_leaves_nothing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="leaves nothing"):
        run(config("exclude=ends", "exclude.first=50"), tmp_path)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["ratio.target=0.99"], "cannot be removed from"),
        (["pruner.kinds=[experts]", "criterion=random"], "no units of kind"),
        (
            [
                "pruner=unstructured",
                "criterion=weight_magnitude",
                "exclude=none",
                "ratio.target=0.99",
            ],
            "cannot be removed from",
        ),
    ],
)
def test_what_shapes_make_impossible_is_said_before_a_weight_is_read(
    words, says, tmp_path, monkeypatch
):
    asked: list[bool] = []
    build = registry.models.build

    def watched(node):
        made = build(node)

        def ask(meta=False, **_):
            asked.append(meta)
            return made(meta=meta)

        return replace(made, entry=replace(made.entry, fn=ask))

    monkeypatch.setattr(registry.models, "build", watched)
    with pytest.raises(ConfigError, match=says):
        run(config(*words), tmp_path)
    assert asked == [True]


def test_a_criterion_that_the_pruner_cannot_use_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot score .it scores .*; possible: .*random"):
        run(config("pruner=depth", "criterion=l2"), tmp_path)


def prunekit(*args: str, cwd) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "prunekit", *args],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_command_line_runs_and_prints_the_table(tmp_path):
    done = prunekit(*TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "perplexity pydocs" in done.stdout
    assert "checkpoint" in done.stdout
    [result] = tmp_path.glob("outputs/**/result.json")
    assert str(result.parent.name) in done.stdout


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["ratio.target=1.2"], "less than 1"),
        (["criterion=tailor"], "taylor"),
        (["criterion.mod=vectorize"], "mode"),
        (["ratioo.target=0.3"], "ratio"),
        (["lst"], "list"),
    ],
)
def test_command_line_errors_name_what_is_possible(args, says, tmp_path):
    done = prunekit(*TINY, *args, cwd=tmp_path)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_failed_job_does_not_stop_a_sweep(tmp_path):
    done = prunekit("-m", *TINY, "ratio.target=0.99,0.2,20", cwd=tmp_path)
    assert done.returncode != 0
    assert "cannot be removed" in done.stderr
    assert len(list(tmp_path.glob("outputs/**/result.json"))) == 1
    assert len(list(tmp_path.glob("outputs/**/failed.txt"))) == 2
    said = done.stderr
    assert said.count("will fail") == 1
    assert said.index("ratio.target=20 will fail: ratio=") < said.index("loading the model")


def test_a_run_that_is_refused_is_no_job_for_the_report(tmp_path):
    done = prunekit(*TINY, "ratio.target=20", cwd=tmp_path)
    assert done.returncode == 2
    assert "ConfigError: ratio=" in done.stderr
    [folder] = tmp_path.glob("outputs/*/*")
    assert not list(folder.iterdir())


def test_list_names_every_component(tmp_path):
    done = prunekit("list", "criterion", cwd=tmp_path)
    assert done.returncode == 0
    for name in ("taylor", "l1", "l2", "random"):
        assert name in done.stdout


def test_threads_do_not_leak_into_the_global_generator(tmp_path):
    """Measuring the dense model first must not change what is pruned."""
    with_dense = run(config("criterion=random"), tmp_path / "a")["kept"]
    without = run(config("criterion=random") | {"eval": {}}, tmp_path / "b")["kept"]
    assert with_dense == without
    assert torch.initial_seed() == 42
