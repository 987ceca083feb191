"""Sweeps: rows and lists become jobs, the same command takes up where it was cut off, a failure
stays with its job.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from fakes import config, result
from paths import ROOT
from waiting import until

from prunekit.errors import ConfigError
from prunekit.runner import progress, resume, sweep
from prunekit.runner.inputs import inputs

ROWS = {"L2": {"criterion": "l2"}, "Channel (all)": {"pruner": "channel", "exclude": "none"}}


def words_of(plan):
    return [set(words) for _, words in plan.jobs]


def test_every_row_meets_every_value():
    plan = sweep.expand(["experiment=t", "seed=0,1"], ROWS, None)
    assert [name for name, _ in plan.jobs] == [
        "L2_seed=0",
        "L2_seed=1",
        "Channel-all_seed=0",
        "Channel-all_seed=1",
    ]
    assert words_of(plan)[0] == {"experiment=t", "seed=0", "criterion=l2", "row='L2'"}


def test_what_is_typed_wins_over_the_row_and_the_row_over_the_scale():
    scale = {"pruner": "oneshot", "eval": "quick", "exclude": "ends"}
    plan = sweep.expand(["exclude=range"], ROWS, {"seed": 1, "eval": "paper"}, scale)
    assert words_of(plan)[1] == {
        "exclude=range",
        "pruner=channel",
        "eval=quick",
        "seed=1",
        "row='Channel (all)'",
    }


def test_choosing_a_component_ends_what_was_said_of_another_ones_options():
    base = {"exclude": "range", "exclude.heads": [4, 30], "ratio.target": 0.25}
    plan = sweep.expand([], ROWS, base)
    assert "exclude.heads=[4,30]" in plan.jobs[0][1]
    assert words_of(plan)[1] == {
        "exclude=none",
        "pruner=channel",
        "ratio.target=0.25",
        "row='Channel (all)'",
    }
    typed = sweep.expand(["exclude=ends", "ratio.target=0.5"], {"a": {}}, base)
    assert words_of(typed)[0] == {"exclude=ends", "ratio.target=0.5", "row='a'"}


def test_a_scale_can_replace_what_one_row_says():
    plan = sweep.expand(
        [], {"a": {"ratio.target": 0.5}, "b": {}}, {"rows": {"a": {"ratio.target": 0.3}}}
    )
    assert words_of(plan) == [{"ratio.target=0.3", "row='a'"}, {"row='b'"}]


def test_a_scale_can_leave_a_row_out_unless_it_is_asked_for():
    scale = {"rows": {"a": None}}
    assert words_of(sweep.expand([], {"a": {"seed": 1}, "b": {}}, scale)) == [{"row='b'"}]
    assert words_of(sweep.expand(["row=a"], {"a": {"seed": 1}, "b": {}}, scale)) == [
        {"seed=1", "row='a'"}
    ]


def test_a_row_can_hold_a_list_of_values():
    plan = sweep.expand(
        [], {"layer": {"exclude.heads": "[0,1],[1,2]", "exclude.neurons": [0, 0]}}, None
    )
    assert len(plan.jobs) == 2
    assert "exclude.heads=[0,1]" in plan.jobs[0][1]
    assert "exclude.neurons=[0,0]" in plan.jobs[1][1]


def test_rows_are_chosen_by_name():
    assert len(sweep.expand(["row=L2"], ROWS, None).jobs) == 1
    with pytest.raises(ConfigError, match="no row 'L3'.*L2"):
        sweep.expand(["row=L3"], ROWS, None)
    with pytest.raises(ConfigError, match="there is none"):
        sweep.expand(["row=L2"], None, None)


def test_an_endless_range_is_refused():
    with pytest.raises(ConfigError, match="no list of values"):
        sweep.expand(["ratio.target=interval(0,1)"], None, None)


NO_OTHER = ["track=silent", "cache=off", "resume=config", "keep_stages=true"]


def test_more_values_find_the_folder_of_fewer():
    a = sweep.expand(["model=tiny_llama", "ratio.target=0.1,0.2"], None, None)
    b = sweep.expand(["model=tiny_llama", "ratio.target=0.1,0.2,0.3", *NO_OTHER], None, None)
    c = sweep.expand(["model=hf", "ratio.target=0.1,0.2"], None, None)
    assert a.key == b.key != c.key
    assert {name for name, _ in a.jobs} < {name for name, _ in b.jobs}


def test_folders_say_the_table_and_what_was_changed():
    plain = sweep.expand(["experiment=t", "scale=small", "data_root=/d"], ROWS, None)
    assert sweep.folder_of(plain.key, "llm_pruner/table6", "small") == "llm_pruner/table6-small"
    changed = sweep.expand(["experiment=t", "calib.samples=128"], ROWS, None)
    assert sweep.folder_of(changed.key, "llm_pruner/table6", "full").startswith(
        "llm_pruner/table6-"
    )


def test_names_of_folders_are_short_and_differ():
    long = sweep.slug(["x" * 200 + "1"]), sweep.slug(["x" * 200 + "2"])
    assert all(len(s) <= 100 for s in long)
    assert long[0] != long[1]
    assert sweep.slug(["targets=[a,b]"]).count("/") == 0


@pytest.mark.parametrize("value", [None, True, 3, 0.5, [1, "a"], {"k": [False]}, "x=y, z"])
def test_values_of_a_row_survive_hydras_grammar(value):
    (parsed,) = sweep.parse([f"key={sweep.literal(value)}"])
    assert parsed.value() == value or str(parsed.value()).strip("'") == value


def test_only_the_same_configuration_and_code_count_as_finished(tmp_path, caplog):
    cfg = config() | {"resume": "strict"}
    code = resume.code_version(cfg)
    assert not resume.finished(tmp_path, cfg)
    result(tmp_path, {}, cfg | {"out": "elsewhere"}, provenance={"code": code})
    assert resume.finished(tmp_path, cfg)
    assert not caplog.text
    assert not resume.finished(tmp_path, cfg | {"seed": 1})
    assert "holds a result of another configuration, which is replaced" in caplog.text
    assert not resume.finished(tmp_path, cfg | {"resume": "off"})
    result(tmp_path, {}, cfg, provenance={"code": "older"})
    assert not resume.finished(tmp_path, cfg)
    assert "holds a result of other code or files, which is replaced" in caplog.text
    assert resume.finished(tmp_path, cfg | {"resume": "config"})
    (tmp_path / "failed.txt").write_text("x")
    assert not resume.finished(tmp_path, cfg | {"resume": "config"})


def test_a_changed_file_that_a_configuration_names_is_another_job(tmp_path):
    text, model = tmp_path / "t.txt", tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    text.write_text("one")
    named = {"calib": {"name": "text", "path": str(text)}, "model": {"path": str(model)}}
    cfg = config(**named) | {"resume": "strict"}
    made_by = {"code": resume.code_version(cfg), "files": inputs(cfg)}
    assert len(made_by["files"]) == 2
    result(tmp_path, {}, cfg, provenance=made_by)
    assert resume.finished(tmp_path, cfg)
    text.write_text("another")
    assert not resume.finished(tmp_path, cfg)
    assert resume.finished(tmp_path, cfg | {"resume": "config"})
    text.unlink()
    result(tmp_path, {}, cfg, provenance=made_by | {"files": inputs(cfg)})
    assert resume.finished(tmp_path, cfg)
    (model / "config.json").write_text("{ }")
    assert not resume.finished(tmp_path, cfg)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", '{"config": {}}', "\udcff", "folder", "link"]
)
def test_a_damaged_result_is_set_aside_and_named(tmp_path, content, caplog):
    path = tmp_path / "result.json"
    if content == "folder":
        path.mkdir()
    elif content == "link":
        path.symlink_to("nowhere")
    else:
        path.write_text(content, errors="surrogateescape")
    for i in ("", "1"):
        assert not resume.finished(tmp_path, config())
        assert not os.path.lexists(path)
        assert os.path.lexists(tmp_path / f"result.json.damaged{i}")
        assert f"{path} is no result" in caplog.text
        caplog.clear()
        path.write_text("{")


def test_a_failure_that_no_file_tells_of_is_listed_beside_an_older_result(tmp_path):
    names = ("fine", "hidden", "failed", "killed", "full disk")
    fine, hidden, failed, killed, full = folders = [tmp_path / name for name in names]
    for folder in (fine, hidden):
        result(folder, {}, config())
    failed.mkdir()
    (failed / "failed.txt").write_text("ValueError: no\n")
    noted = [f"prunekit: job {folder} failed: OSError: full" for folder in (hidden, failed, full)]
    assert sweep.badly_ended(folders, noted) == [
        noted[0],
        f"prunekit: job {failed} failed: ValueError: no",
        f"prunekit: job {killed} unfinished",
        noted[2],
    ]


def test_a_checkpoint_that_is_gone_is_said(tmp_path, caplog):
    cfg = config() | {"resume": "config"}
    result(tmp_path, {}, cfg, checkpoint=str(tmp_path / "checkpoint"))
    assert resume.finished(tmp_path, cfg)
    assert "its checkpoint is gone" in caplog.text
    caplog.clear()
    (tmp_path / "checkpoint").mkdir()
    assert resume.finished(tmp_path, cfg)
    assert not caplog.records


def test_a_change_in_what_a_job_does_is_one_line(tmp_path, caplog):
    caplog.set_level("INFO", logger="prunekit")
    with progress.show_progress([tmp_path], every=0.01):
        progress.note(tmp_path, "load")
        until(lambda: len(caplog.records) == 1)
        progress.note(tmp_path, "prune")
        until(lambda: len(caplog.records) == 2)
    assert [r.getMessage().rpartition(": ")[2] for r in caplog.records] == ["load", "prune"]


QUICK = [
    "model=tiny_llama",
    "exclude=none",
    "eval=quick",
    "track=silent",
    "save=false",
    "resume=config",
]


def start(folder: Path, *words: str) -> subprocess.Popen:
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PRUNEKIT_CACHE": str(folder / "cache"),
    }
    command = [sys.executable, "-m", "prunekit", "-m", *QUICK, "hydra.sweep.dir=jobs", *words]
    return subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(folder: Path, *words: str) -> tuple[int, str]:
    process = start(folder, *words)
    out, _ = process.communicate(timeout=600)
    return process.returncode, out


def done(folder: Path) -> dict[str, int]:
    """job -> when its result was written."""
    return {p.parent.name: p.stat().st_mtime_ns for p in (folder / "jobs").glob("*/result.json")}


@pytest.mark.slow
def test_a_folder_for_one_run_is_refused(tmp_path):
    status, out = finish(tmp_path, "seed=0,1", "hydra.run.dir=there")
    assert status == 2
    assert "a sweep takes hydra.sweep.dir=FOLDER" in out.splitlines()[-1]


@pytest.mark.slow
def test_a_failure_stays_with_its_job_and_the_same_command_redoes_it_alone(tmp_path):
    status, out = finish(tmp_path, "ratio.target=0.1,0.95,0.2")
    assert status == 2
    assert "cannot be removed" in out.splitlines()[-1]
    before = done(tmp_path)
    assert set(before) == {"ratio.target=0.1", "ratio.target=0.2"}
    assert "ConfigError" in (tmp_path / "jobs" / "ratio.target=0.95" / "failed.txt").read_text()
    status, out = finish(tmp_path, "ratio.target=0.1,0.3,0.2")
    assert (status, "3 jobs, 2 finished before" in out) == (0, True)
    assert before.items() < done(tmp_path).items()


@pytest.mark.slow
def test_experiments_without_a_table_have_folders_of_their_own(tmp_path):
    for name in ("peers/flap", "peers/shortgpt"):
        words = [
            f"experiment={name}",
            "seed=0,1",
            "ratio.target=2",
            "track=silent",
        ]  # refused at once: only the folders matter
        subprocess.run(
            [sys.executable, "-m", "prunekit", "-m", *words],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            check=False,
        )
    assert {p.name.partition("-")[0] for p in (tmp_path / "outputs" / "peers").iterdir()} == {
        "flap",
        "shortgpt",
    }


@pytest.mark.slow
def test_killed_at_any_moment_nothing_finished_is_lost(tmp_path):
    words = "ratio.target=0.1,0.2,0.3"
    process = start(tmp_path, words)
    while not done(tmp_path):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = done(tmp_path)
    for path in (tmp_path / "jobs").glob("*/result.json"):
        json.loads(path.read_text())
    status, _ = finish(tmp_path, words)
    assert status == 0
    assert len(done(tmp_path)) == 3
    assert before.items() <= done(tmp_path).items()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["submitit_local", "joblib"])
def test_workers_finish_a_sweep_of_which_one_job_is_killed(tmp_path, launcher):
    words = ["ratio.target=0.1,0.2,0.3,0.4", f"hydra/launcher={launcher}"]
    process = start(tmp_path, *words)
    killed = False
    while not killed and process.poll() is None:
        killed = kill_a_worker(process.pid, launcher)
        time.sleep(0.02)
    out, _ = process.communicate(timeout=600)
    assert killed
    assert process.returncode == 1
    assert "unfinished" in out
    before = done(tmp_path)
    # joblib's pool ends with a worker that dies; submitit's other jobs go on.
    assert len(before) == 3 or launcher == "joblib"
    status, out = finish(tmp_path, *words)
    assert (status, len(done(tmp_path))) == (0, 4), out
    assert before.items() <= done(tmp_path).items()


def kill_a_worker(pid: int, launcher: str) -> bool:
    """SIGKILL to one process that has begun a job."""
    mark = (
        "submitit.core._submit" if launcher == "submitit_local" else "loky.backend.popen_loky_posix"
    )
    try:
        workers = [
            p for p in psutil.Process(pid).children(recursive=True) if mark in " ".join(p.cmdline())
        ]
        for worker in workers:
            if any(f.path.endswith("run.log") for f in worker.open_files()):
                worker.kill()
                return True
    except psutil.Error:
        return False
    return False


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("launcher", ["submitit_local", "joblib", "basic", "local"])
def test_workers_end_with_the_sweep(tmp_path, launcher, how):
    words = ["ratio.target=0.1,0.2", f"hydra/launcher={launcher}"]
    process = start(tmp_path, *words, "recovery=lora_text", "recovery.max_steps=100000")
    top = psutil.Process(process.pid)
    while len(list((tmp_path / "jobs").glob("*/stage.txt"))) < (1 if launcher == "basic" else 2):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    workers = top.children(recursive=True)
    process.send_signal(how)
    process.wait(10)
    left = psutil.wait_procs(workers, timeout=3)[1]
    names = [" ".join(p.cmdline()) for p in left if p.status() != psutil.STATUS_ZOMBIE]
    assert not [name for name in names if "prunekit" in name or "loky" in name]


@pytest.mark.slow
def test_two_sweeps_at_once_do_every_job_once(tmp_path):
    words = ["ratio.target=0.1,0.2"]
    both = [start(tmp_path, *words) for _ in range(2)]
    outs = [p.communicate(timeout=600)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0], outs
    assert len(done(tmp_path)) == 2
    assert sum(out.count("dense: measuring ppl") for out in outs) == 2, outs


def test_the_slurm_yaml_asks_for_what_a_7b_job_needs(tmp_path, monkeypatch):
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from prunekit.cli.main import conf_dir

    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv(
        "PATH", f"{tmp_path}:{os.environ['PATH']}"
    )  # submitit looks for srun before it writes a script
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose(
            "config",
            overrides=["hydra/launcher=slurm", "hydra.launcher.partition=gpu"],
            return_hydra_config=True,
        )
    OmegaConf.set_readonly(cfg, False)
    cfg.hydra.launcher.submitit_folder, cfg.hydra.launcher.name = str(tmp_path / "logs"), "prunekit"
    executor = instantiate(cfg.hydra.launcher).executor()
    script = executor._executor._make_submission_file_text("command", "1")
    for line in (
        "--partition=gpu",
        "--gpus-per-node=1",
        "--mem=48GB",
        "--cpus-per-task=8",
        "--time=480",
    ):
        assert f"#SBATCH {line}" in script


def test_a_70b_model_gets_one_job_with_eight_gpus():
    from hydra import compose, initialize_config_dir

    from prunekit.cli.main import conf_dir

    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        overrides = ["model=llama2_70b", "hydra/launcher=slurm_70b"]
        cfg = compose("config", overrides=overrides, return_hydra_config=True)
    launcher = cfg.hydra.launcher
    assert launcher._target_.endswith("TolerantSlurm")
    assert (launcher.gpus_per_node, launcher.tasks_per_node, launcher.nodes) == (8, 1, 1)
    assert launcher.mem_gb > 2 * 140


@pytest.mark.parametrize("name", ["local", "slurm"])
def test_the_launcher_that_a_yaml_names_is_there(name):
    from hydra.utils import get_class

    node = yaml.safe_load((ROOT / "conf" / "hydra" / "launcher" / f"{name}.yaml").read_text())
    assert get_class(node["_target_"])
