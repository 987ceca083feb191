"""deterministic=true is set for a run, and for no longer."""

from __future__ import annotations

import json
import os

import pytest
import torch
from compositions import config

from prunekit.errors import ConfigError
from prunekit.runner import run as runner
from prunekit.runner.determinism import CUBLAS, repeatable
from prunekit.runner.run import run

ASKED = {"deterministic": True}


def state():
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
        os.environ.get(CUBLAS),
    )


@pytest.fixture(autouse=True)
def as_torch_begins(monkeypatch):
    monkeypatch.delenv(CUBLAS, raising=False)


def test_flags_are_set_inside_and_are_what_they_were_afterwards(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before = state()
    with repeatable(ASKED):
        assert state() == (True, False, False, ":4096:8")
    assert state() == before
    with pytest.raises(KeyError), repeatable(ASKED):
        raise KeyError
    assert state() == before


def test_a_workspace_that_the_user_chose_stays(monkeypatch):
    monkeypatch.setenv(CUBLAS, ":16:8")
    with repeatable(ASKED):
        assert os.environ[CUBLAS] == ":16:8"
    assert os.environ[CUBLAS] == ":16:8"


def test_nothing_is_set_where_it_is_not_asked_for():
    before = state()
    with repeatable({"deterministic": False}), repeatable({}):
        assert state() == before


def test_an_operation_without_a_deterministic_form_is_named():
    words, where = r"put_ has no form .* deterministic=false", torch.tensor([0, 0])
    with pytest.raises(ConfigError, match=words), repeatable(ASKED):
        torch.zeros(2).put_(where, torch.tensor([1.0, 2.0]))


def test_a_name_of_two_words_is_one_too():
    with pytest.raises(ConfigError, match="true: median CUDA has no form"), repeatable(ASKED):
        raise RuntimeError("median CUDA does not have a deterministic implementation, but you set")


def test_other_errors_are_left_as_they_are():
    with pytest.raises(RuntimeError, match="invalid"), repeatable(ASKED):
        torch.zeros(2).view(3)


def test_a_workspace_that_sums_in_any_order_is_named(monkeypatch):
    monkeypatch.setenv(CUBLAS, ":0:0")
    with pytest.raises(ConfigError, match=":0:0; possible: :4096:8, :16:8"), repeatable(ASKED):
        pass


def test_cuda_that_has_begun_otherwise_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    words = "CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment"
    with pytest.raises(ConfigError, match=words), repeatable(ASKED):
        pass


def test_a_run_is_deterministic_from_loading_to_saving(tmp_path, monkeypatch):
    seen = []
    measure = runner.measured

    def noted(*args):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return measure(*args)

    monkeypatch.setattr(runner, "measured", noted)
    monkeypatch.setenv("PRUNEKIT_CACHE", str(tmp_path / "cache"))
    results = {}
    for asked in ("true", "false"):
        record = run(config(f"deterministic={asked}", "save=false"), tmp_path / asked)
        results[asked] = record["results"]
        # What was computed without it is not taken where it is asked for.
        assert not json.loads((tmp_path / asked / "result.json").read_text())["cached"]
    half = len(seen) // 2
    assert seen == [True] * half + [False] * half
    assert results["true"]["pruned/ppl_pydocs_32"] == results["false"]["pruned/ppl_pydocs_32"]


def test_a_value_that_is_no_choice_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="deterministic"):
        run(config("deterministic=sometimes"), tmp_path)
