"""Written answers through lm-eval: local files, and refusals before any work."""

from __future__ import annotations

import json
import os

import pytest

from prunekit.errors import ConfigError
from prunekit.evals.kick_tasks import SWITCH, allowed, check_kick_tasks
from prunekit.evals.lm_eval_tasks import accuracies
from prunekit.registry import Component, calibs, evals, models
from prunekit.runner.texts_at_hand import check_texts


@pytest.fixture(autouse=True)
def no_folder(monkeypatch):
    monkeypatch.delenv("PRUNEKIT_DATA", raising=False)


def checked(**options):
    calib: Component = calibs.build({"name": "crop"})
    node = evals.build({"name": "kick_tasks", **options})
    check_kick_tasks(calib, **node.options)
    check_texts(node)


@pytest.fixture
def folder(tmp_path):
    """A data folder with sums in place of GSM8K."""
    (tmp_path / "tasks").mkdir()
    sums = [
        {"question": f"What is {i} + {i}?", "answer": f"Twice {i}. #### {2 * i}"} for i in range(8)
    ]
    for name in ("gsm8k", "gsm8k_train"):
        text = "\n".join(map(json.dumps, sums))
        (tmp_path / "tasks" / f"{name}.jsonl").write_text(text)
    return str(tmp_path)


def test_a_task_on_local_files_is_lm_evals_own(folder):
    checked(tasks=["gsm8k"], data_root=folder)
    tiny = models.build({"name": "tiny_llama", "layers": 1, "device": "cpu"})()
    node = {"name": "kick_tasks", "tasks": ["gsm8k"], "limit": 2, "data_root": folder}
    found = evals.build(node)(*tiny)
    assert found == {"exact_match_gsm8k": 0.0, "exact_match_gsm8k_stderr": 0.0}


def test_offline_a_data_set_that_is_not_there_is_refused_before_the_work(folder):
    with pytest.raises(ConfigError, match=r"gsm8k: no data folder is named, and the hub did not"):
        checked(tasks=["gsm8k"])
    os.remove(f"{folder}/tasks/gsm8k_train.jsonl")
    with pytest.raises(ConfigError, match="does not hold them"):
        checked(tasks=["gsm8k"], data_root=folder)


def test_code_is_run_where_that_is_said():
    with pytest.raises(ConfigError, match="run_code=true"):
        checked(tasks=["humaneval"])
    before = os.environ.get(SWITCH)
    with allowed(True):
        assert os.environ[SWITCH] == "1"
    assert os.environ.get(SWITCH) == before
    with allowed(False):
        assert os.environ.get(SWITCH) == before


def test_a_filter_of_answers_is_no_part_of_the_key():
    strict = {"exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.125}
    more = {"exact_match,flexible-extract": 0.5, "alias": "gsm8k"}
    found = accuracies({"gsm8k": strict | more}, ["gsm8k"])
    assert found == {"exact_match_gsm8k": 0.25, "exact_match_gsm8k_stderr": 0.125}
