"""A data set that cannot be had is named before the model is loaded."""

from __future__ import annotations

import pytest
from compositions import config

from prunekit.errors import ConfigError
from prunekit.registry import calibs, evals, recoveries
from prunekit.runner.run import run
from prunekit.runner.texts_at_hand import check_texts, warn_of_learnt

FILES = ("wikitext2/train.txt", "ptb/validation.txt", "alpaca/train.jsonl", "c4/a.jsonl")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A data folder of empty files, and a hub that has nothing but says what it was asked for."""
    asked = []

    def nothing(**what):
        asked.append(what["path"])
        raise OSError("no network")

    monkeypatch.setattr("datasets.load_dataset_builder", nothing)
    for file in FILES:
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).touch()
    return tmp_path, asked


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["recovery=lora"], r"alpaca \(train\).*alpaca/train.jsonl"),
        (["calib=wikitext2"], r"wikitext2 \(train\)"),
        (["eval=paper", "eval.size=null"], r"wikitext2 \(test\)"),
        (["eval=general"], r"\(\w+\): no data folder is named, and the hub did not give"),
        (["pruner=compresso", "criterion=none"], r"alpaca \(train\)"),
    ],
)
def test_it_is_named_before_the_model_is_loaded(words, names, folder, tmp_path, monkeypatch):
    monkeypatch.delenv("PRUNEKIT_DATA", raising=False)
    monkeypatch.setattr("prunekit.runner.run.stage", lambda *_: pytest.fail("a stage began"))
    with pytest.raises(ConfigError, match=names):
        run(config("exclude=none", *words), tmp_path / "out")


def test_what_the_folder_has_the_hub_is_not_asked_for(folder):
    place, asked = folder
    texts = {
        "web": {"share": 0.5, "name": "crop", "dataset": "c4", "data_root": str(place)},
        "books": {"share": 0.5, "name": "crop", "dataset": "bookcorpus", "data_root": str(place)},
    }
    crop = calibs.build({"name": "crop", "dataset": "wikitext2", "data_root": str(place)})
    check_texts(calibrated=crop)
    assert asked == []
    with pytest.raises(ConfigError, match=r"wikitext2/test.txt is not there"):
        check_texts(crop)
    with pytest.raises(ConfigError, match=r"bookcorpus \(train\)"):
        check_texts(calibrated=calibs.build({"name": "mix", "texts": texts}))
    assert asked == ["Salesforce/wikitext", "bookcorpus/bookcorpus"]


@pytest.mark.parametrize("name", ["zeroshot", "exit_tasks", "flips", "kick_tasks"])
def test_tasks_that_cannot_be_had_are_named_too(name, folder, tmp_path, monkeypatch):
    place, _ = folder
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("prunekit.runner.run.stage", lambda *_: pytest.fail("a stage began"))
    node = f"+eval.extra={{name: {name}, tasks: [piqa], data_root: {place}}}"
    with pytest.raises(ConfigError, match=r"tasks piqa: .* does not hold them, and the hub did"):
        run(config("exclude=none", node), tmp_path / "out")


def test_what_the_dense_model_writes_is_asked_for_nowhere(folder):
    check_texts(learnt=[recoveries.build({"name": "distill", "dataset": "generated"})])
    assert folder[1] == []


@pytest.mark.parametrize(
    ("learns", "reads", "said"),
    [
        ({"dataset": "alpaca"}, {"dataset": "alpaca"}, "alpaca (train)"),
        ({"dataset": "alpaca"}, {"texts": {"a": {"dataset": "alpaca"}}}, "alpaca (train)"),
        ({"dataset": "ptb"}, {"dataset": "ptb"}, None),
        ({"dataset": "ptb", "split": "validation"}, {"dataset": "ptb"}, "ptb (validation)"),
        ({"dataset": "text", "path": "a.txt"}, {"path": "../{here}/a.txt"}, "a.txt"),
        ({"dataset": "text", "path": "a.txt"}, {"texts": {"a": {"path": "a.txt"}}}, "a.txt"),
        ({"dataset": "text", "path": "a.txt"}, {"path": "b.txt"}, None),
        ({"dataset": "generated"}, {"dataset": "alpaca"}, None),
    ],
)
def test_a_text_that_is_learnt_from_and_tested_on_is_said(
    learns, reads, said, tmp_path, monkeypatch, caplog
):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).touch()
    reads = {k: v.format(here=tmp_path.name) if k == "path" else v for k, v in reads.items()}
    recovery = recoveries.build({"name": "distill", **learns})
    evaluate = evals.build({"name": "positions" if "texts" in reads else "perplexity", **reads})
    warn_of_learnt({"ppl": evaluate}, [None, recovery])
    lines = [r.getMessage() for r in caplog.records]
    assert len(lines) == (said is not None)
    assert all(f"{said}, which eval ppl reads" in line for line in lines)


def test_a_run_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("prunekit.runner.run.stage", lambda *_: pytest.fail("a stage began"))
    words = ["recovery=lora_text", "recovery.split=test"]
    with pytest.raises(pytest.fail.Exception):
        run(config("exclude=none", *words), tmp_path / "out")
    assert "lora learns from pydocs (test), which eval ppl reads" in caplog.text
