"""A job of a sweep: its number for the sweeper, its failure for whoever reads on."""

from __future__ import annotations

import pytest
from compositions import config

from prunekit.runner import job


@pytest.fixture
def result(monkeypatch):
    """What a run gives, in place of one."""
    found = {"results": {"pruned/ppl": 7.5}, "config": config(), "checkpoint": None}
    monkeypatch.setattr(job, "run", lambda cfg, folder: found)
    return found


def test_the_objective_is_the_number_of_its_key(result, tmp_path):
    failures: list[str] = []
    cfg = config() | {"out": str(tmp_path), "objective": "pruned/ppl"}
    assert job.run_job(cfg, failures) == 7.5
    assert job.run_job(cfg | {"objective": None}, failures) is None
    assert failures == []


def test_an_objective_that_nothing_measured_is_named_and_the_result_stays(result, tmp_path):
    failures: list[str] = []
    cfg = config() | {"out": str(tmp_path), "objective": "pruned/pppl"}
    assert job.run_job(cfg, failures) is None
    assert failures == ["prunekit: ConfigError: objective='pruned/pppl'; results are: pruned/ppl"]
    assert not (tmp_path / "failed.txt").exists()


def test_a_failure_is_written_down_and_ends_one_job(monkeypatch, tmp_path):
    def fails(cfg, folder):
        raise RuntimeError("no more memory")

    monkeypatch.setattr(job, "run", fails)
    failures: list[str] = []
    cfg = config() | {"out": str(tmp_path / "new")}
    assert job.run_job(cfg, failures) is None
    assert failures == ["prunekit: RuntimeError: no more memory"]
    assert "in fails" in (tmp_path / "new" / "failed.txt").read_text()
    assert (tmp_path / "new" / "stage.txt").read_text().startswith("failed: RuntimeError")


def test_an_interrupt_ends_them_all(monkeypatch, tmp_path):
    def stopped(cfg, folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        job.run_job(config() | {"out": str(tmp_path)}, [])
