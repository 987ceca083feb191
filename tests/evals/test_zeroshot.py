"""Zero-shot accuracy: names, metrics, local files, docs_cloze, and a model and generators left
alone.
"""

from __future__ import annotations

import logging
import random

import pytest
import torch

from prunekit.errors import ConfigError
from prunekit.evals.lm_eval_tasks import PAPER
from prunekit.registry import evals, models


@pytest.fixture(scope="module")
def tiny():
    return models.build({"name": "tiny_llama", "layers": 2, "device": "cpu"})()


@pytest.fixture(autouse=True)
def no_folder(monkeypatch):
    monkeypatch.delenv("PRUNEKIT_DATA", raising=False)


def test_docs_cloze_needs_nothing_and_a_random_model_guesses(tiny):
    found = evals.build({"name": "zeroshot", "tasks": ["docs_cloze"], "limit": 60})(*tiny)
    assert set(found) == {"acc_docs_cloze", "acc_docs_cloze_stderr", "acc_mean", "acc_mean_stderr"}
    assert found["acc_mean"] == found["acc_docs_cloze"]
    assert 0.05 < found["acc_docs_cloze"] < 0.5


def test_seven_tasks_on_local_files_with_the_papers_metrics(tiny, shared):
    found = evals.build({"name": "zeroshot", "limit": 3, "data_root": str(shared / "data")})(*tiny)
    keys = [f"{metric}_{task}" for task, (metric, _) in PAPER.items()]
    assert set(found) == {*keys, *(f"{k}_stderr" for k in keys), "acc_mean", "acc_mean_stderr"}
    assert found["acc_mean"] == pytest.approx(sum(found[k] for k in keys) / 7)


def test_the_mean_is_over_local_and_stock_tasks(tiny, shared):
    found = evals.build(
        {
            "name": "zeroshot",
            "tasks": ["arc_easy", "docs_cloze"],
            "limit": 3,
            "data_root": str(shared / "data"),
        }
    )(*tiny)
    assert found["acc_mean"] == pytest.approx((found["acc_arc_easy"] + found["acc_docs_cloze"]) / 2)


def test_model_tokenizer_and_generators_are_left_as_found(tiny):
    model, tokenizer = tiny
    tokenizer.pad_token = None
    model.train()
    modes = [m.training for m in model.modules()]
    torch.manual_seed(3)
    random.seed(3)
    states = torch.get_rng_state(), random.getstate(), logging.getLogger("lm_eval").level
    evals.build({"name": "zeroshot", "tasks": ["docs_cloze"], "limit": 4})(model, tokenizer)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert logging.getLogger("lm_eval").level == states[2]
    assert tokenizer.pad_token is None
    assert [m.training for m in model.modules()] == modes
    model.eval()


def test_lm_eval_says_nothing_but_its_bar(tiny, capsys, caplog):
    evals.build({"name": "zeroshot", "tasks": ["docs_cloze"], "limit": 4})(*tiny)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "requests" in shown.err
    assert "WARNING" not in shown.err
    assert not [r for r in caplog.records if r.name.startswith("lm_eval")]


def test_unknown_task_is_named_before_anything_is_loaded():
    with pytest.raises(ConfigError, match=r"'hellaswg'.*hellaswag"):
        evals.build({"name": "zeroshot", "tasks": ["boolq", "hellaswg"]})
    with pytest.raises(ConfigError, match="one task at least"):
        evals.build({"name": "zeroshot", "tasks": []})
    assert evals.build({"name": "zeroshot", "tasks": ["lambada_openai", "mmlu"]})


def test_without_files_and_hub_the_error_names_both_ways(tiny):
    with pytest.raises(
        ConfigError,
        match=r"arc_easy: no data folder is named, and the hub did not give.*"
        r"data_root= or PRUNEKIT_DATA",
    ):
        evals.build({"name": "zeroshot", "tasks": ["arc_easy"], "limit": 2})(*tiny)


@pytest.mark.slow
def test_the_real_model_finds_most_continuations_but_not_all(smollm2):
    found = evals.build({"name": "zeroshot", "tasks": ["docs_cloze"], "limit": 100})(*smollm2)
    assert 0.6 < found["acc_docs_cloze"] < 0.97


def test_a_prompt_that_stays_with_the_model_stands_before_each_question(tiny, monkeypatch):
    model, tokenizer = tiny
    read, forward = [], model.forward

    def heard(input_ids, **kwargs):
        read.append(tokenizer.decode(input_ids[0]))
        return forward(input_ids, **kwargs)

    monkeypatch.setattr(model, "forward", heard)
    monkeypatch.setattr(
        model.config, "collaborative_prompt", "You are smaller now. ", raising=False
    )
    evals.build({"name": "zeroshot", "tasks": ["docs_cloze"], "limit": 2})(model, tokenizer)
    assert read
    assert all("You are smaller now." in text for text in read)
