"""One job: what its failure leaves behind, and what two processes make of it."""

from __future__ import annotations

import errno
import re
import resource
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from fakes import config, result

from prunekit.errors import ConfigError
from prunekit.runner import job, resume


def failing(monkeypatch, error: Exception) -> None:
    def run(cfg, folder, words):
        raise error

    monkeypatch.setattr(job, "run", run)


def failures_of(folder: Path, **changes) -> list[str]:
    failures: list[str] = []
    job.run_job(config(**changes) | {"out": str(folder), "objective": None}, failures)
    return failures


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_cannot_be_written_is_a_message(tmp_path, monkeypatch, caplog, code):
    import os

    failing(monkeypatch, OSError(code, os.strerror(code), "checkpoint"))
    [said] = failures_of(tmp_path)
    assert said == f"prunekit: checkpoint cannot be written: {os.strerror(code)}"
    assert "Traceback" not in caplog.text
    assert os.strerror(code) in (tmp_path / "failed.txt").read_text()


def test_a_checkpoint_of_an_earlier_run_is_told_from_ones_own(tmp_path, monkeypatch, caplog):
    failing(monkeypatch, ConfigError("no"))
    (tmp_path / "checkpoint").mkdir()
    failures_of(tmp_path, save=True)
    assert not caplog.text
    failures_of(tmp_path, save=False)
    assert "checkpoint is an earlier run's, this one saves none" in caplog.text


def test_only_a_run_that_has_begun_leaves_its_failure(tmp_path, monkeypatch):
    failing(monkeypatch, ConfigError("no"))
    assert failures_of(tmp_path) == ["prunekit: ConfigError: no"]
    assert not list(tmp_path.iterdir())
    (tmp_path / "stage.txt").write_text("load")
    failures_of(tmp_path)
    assert "ConfigError: no" in (tmp_path / "failed.txt").read_text()


def test_a_folder_that_takes_no_failure_stops_nothing(tmp_path, monkeypatch, caplog):
    failing(monkeypatch, ConfigError("no"))
    (tmp_path / "failed.txt").mkdir()
    (tmp_path / "stage.txt").mkdir()
    assert any("failed.txt" in f or "no" in f for f in failures_of(tmp_path))


def test_a_folder_that_is_a_file_is_a_message(tmp_path):
    (tmp_path / "file").write_text("")
    [said] = failures_of(tmp_path / "file")
    assert "file" in said


def test_a_folder_with_a_result_is_said_to_be_written_anew(tmp_path, monkeypatch, caplog):
    failing(monkeypatch, ConfigError("stop"))
    failures_of(tmp_path)
    assert "replaces" not in caplog.text
    (tmp_path / "result.json").write_text("{}")
    failures_of(tmp_path)
    assert f"{tmp_path} holds a result, which this run replaces at its end" in caplog.text


def test_what_nobody_expected_has_a_traceback(tmp_path, monkeypatch, caplog):
    failing(monkeypatch, KeyError("x"))
    assert failures_of(tmp_path) == ["prunekit: KeyError: 'x'"]
    assert "Traceback" in caplog.text
    assert "KeyError" in (tmp_path / "failed.txt").read_text()


def test_one_process_at_a_time_runs_a_job(tmp_path):
    order = []
    inside, leave = threading.Event(), threading.Event()

    def first() -> None:
        with job.alone(tmp_path):
            order.append("first")
            inside.set()
            leave.wait(10)
            order.append("left")

    def second() -> None:
        inside.wait(10)
        with job.alone(tmp_path):
            order.append("second")

    threads = [threading.Thread(target=t) for t in (first, second)]
    for thread in threads:
        thread.start()
    inside.wait(10)
    threading.Timer(0.3, leave.set).start()
    for thread in threads:
        thread.join(10)
    assert order == ["first", "left", "second"]


@pytest.mark.parametrize(
    ("sweeping", "processes", "made"), [(True, 1, True), (False, 1, False), (True, 2, False)]
)
def test_what_another_sweep_made_since_this_one_looked_is_taken(
    tmp_path, monkeypatch, caplog, sweeping, processes, made
):
    cfg = config() | {"out": str(tmp_path), "objective": None, "resume": "strict"}
    monkeypatch.setattr(job, "sweeping", lambda: sweeping)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    failing(monkeypatch, ConfigError("it runs"))
    failures: list[str] = []
    result(tmp_path, {}, cfg, provenance={"code": resume.code_version(cfg)})
    job.run_job(cfg, failures)
    assert bool(failures) != made


def test_a_sweep_has_said_which_results_its_jobs_replace(tmp_path, monkeypatch, caplog):
    cfg = config() | {"out": str(tmp_path), "objective": None, "resume": "strict"}
    monkeypatch.setattr(job, "sweeping", lambda: True)
    failing(monkeypatch, ConfigError("it runs"))
    result(tmp_path, {}, cfg, provenance={"code": "older"})
    failures: list[str] = []
    job.run_job(cfg, failures)
    assert failures
    assert "replace" not in caplog.text


@contextmanager
def files_of_at_most(size: int):
    """Inside, a file that would grow beyond `size` bytes is refused by the system, as by a disk
    that is full.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [200, 3000, 30_000])
def test_what_the_disk_does_not_take_is_said_and_leaves_nothing_half_written(tmp_path, size):
    from compositions import config as composed

    cfg = composed("recovery=lora_text", "recovery.max_steps=1", "recovery.max_length=16")
    failures: list[str] = []
    with files_of_at_most(size):
        job.run_job(cfg | {"out": str(tmp_path / "job"), "save": True}, failures)
    [said] = failures
    assert re.search("cannot be written: File too large", said), said
    left = [p for p in (tmp_path / "job").rglob("*") if p.is_file()]
    assert not [p for p in left if ".part" in str(p) or p.suffix == ".tmp"]
    assert {p.name for p in left} <= {".running", "failed.txt", "stage.txt"} | {
        p.name for p in left if p.suffix == ".entry"
    }
    assert "cannot be written" in (tmp_path / "job" / "failed.txt").read_text()


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    for place in (tmp_path, tmp_path / "stages" / "key"):
        (place / ".checkpoint.part7").mkdir(parents=True)
        (place / "result.7.tmp").write_text("half")
        (place / "whole.json").write_text("{}")
    with job.alone(tmp_path):
        pass
    left = {p.name for p in tmp_path.rglob("*") if p.is_file()}
    assert left == {"whole.json", ".running"}
    assert not list(tmp_path.rglob("*.part*"))
