"""A run that was cut off goes on after its last whole stage, to the same bits."""

from __future__ import annotations

import json

import pytest
import torch
from compositions import config
from tiny_models import tiny_model

from prunekit.activations import done_blocks
from prunekit.activations.done_blocks import DoneBlocks
from prunekit.errors import ConfigError
from prunekit.models.tiny import byte_tokenizer
from prunekit.runner import run as runner
from prunekit.runner.finished import Finished, described, restored
from prunekit.runner.job import run_job
from prunekit.runner.resume import result_key
from prunekit.runner.run import run
from prunekit.types import Group, Member

COMPRESSO = ["pruner=compresso", "criterion=none", "ratio=global"]
RECOVER = ("recovery=lora_text", "recovery.max_steps=2", "recovery.max_length=32")
TWO = "+eval.macs={name:macs}"


def numbers(record):
    return record["results"], record["importance"], record["kept"], record["stages"].keys()


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "checkpoint" / "model.safetensors")


class Cut(Exception):
    pass


def cut_off(monkeypatch, name: str) -> None:
    """The run ends when stage `name` begins, as by a kill: nothing is tidied up."""
    real = runner.stage

    def stage(job, now, says):
        if now == name:
            raise Cut
        return real(job, now, says)

    monkeypatch.setattr(runner, "stage", stage)


def stages_run(monkeypatch) -> list[str]:
    ran, real = [], runner.stage
    monkeypatch.setattr(runner, "stage", lambda j, n, s: (ran.append(n), real(j, n, s))[1])
    return ran


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Result and weights of a run with everything in it."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("whole")
        patch.setenv("PRUNEKIT_CACHE", str(folder / "cache"))
        return run(config(*RECOVER, TWO), folder), weights(folder)


ORDER = ["load", "dense/size", "dense/ppl", "dense/macs", "prune"]
ORDER += ["pruned/size", "pruned/ppl", "pruned/macs", "recover"]
ORDER += ["recovered/size", "recovered/ppl", "recovered/macs", "save"]


CUTS = ["dense/macs", "pruned/ppl", "recover", "recovered/ppl"]


@pytest.mark.parametrize("at", CUTS)
def test_the_next_stage_is_the_first_that_runs_again(at, tmp_path, monkeypatch, undisturbed):
    monkeypatch.setenv("PRUNEKIT_CACHE", str(tmp_path / "cache"))
    cfg = config(*RECOVER, TWO)
    with monkeypatch.context() as patch:
        cut_off(patch, at)
        with pytest.raises(Cut):
            run(cfg, tmp_path)
    assert not (tmp_path / "result.json").exists()
    ran = stages_run(monkeypatch)
    record = run(cfg, tmp_path)
    again = ORDER[ORDER.index(at) :]
    assert ran == (["load", *again] if at in ("dense/macs", "prune") else again)
    assert numbers(record) == numbers(undisturbed[0])
    assert all(torch.equal(w, undisturbed[1][n]) for n, w in weights(tmp_path).items())
    assert not (tmp_path / "stages").exists()


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A model of stock transformers in half precision, as a folder."""
    folder = tmp_path_factory.mktemp("half")
    tiny_model("llama", layers=4, vocab_size=259).bfloat16().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "words",
    [
        ["model.compute=float32"],
        ["pruner=depth", "criterion=block_magnitude", "ratio.of=units", "ratio.target=0.25"],
    ],
    ids=["wide", "fewer blocks"],
)
def test_what_is_more_than_weights_is_there_again(half, words, tmp_path, monkeypatch):
    words = [f"model=hf model.path={half}", *words, "recovery=distill", "recovery.hidden=1"]
    words = [*words[0].split(), *words[1:], "recovery.dataset=pydocs", "recovery.max_steps=2"]
    cfg = config(*words, "recovery.max_length=32", "recovery.validation_size=0", "cache=off")
    whole = run(cfg, tmp_path / "whole")
    with monkeypatch.context() as patch:
        cut_off(patch, "pruned/ppl")
        with pytest.raises(Cut):
            run(cfg, tmp_path / "cut")
    rest = run(cfg, tmp_path / "cut")
    assert numbers(rest) == numbers(whole)
    assert rest["notes"] == whole["notes"]


def test_the_pruned_model_is_on_disk_before_the_recovery(tmp_path, monkeypatch):
    from prunekit.checkpoint import load

    cut_off(monkeypatch, "recover")
    with pytest.raises(Cut):
        run(config(*RECOVER), tmp_path)
    [folder] = (tmp_path / "stages").glob("*/pruned")
    assert load(folder)[0].config.model_type == "llama"


def test_stages_of_another_configuration_are_not_taken_up(tmp_path, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        cut_off(patch, "pruned/ppl")
        with pytest.raises(Cut):
            run(config(), tmp_path)
    ran = stages_run(monkeypatch)
    run(config("ratio.target=0.3"), tmp_path)
    assert "prune" in ran
    assert "is dropped: another configuration, code or text made it" in caplog.text


def test_a_typo_in_the_repeated_command_takes_no_stage_away(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        cut_off(patch, "pruned/ppl")
        with pytest.raises(Cut):
            run(config(), tmp_path)
    with pytest.raises(ConfigError):
        run(config("calib.length=1"), tmp_path)
    assert list((tmp_path / "stages").glob("*/pruned"))


def test_another_recovery_goes_on_from_the_pruned_model(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        cut_off(patch, "recovered/ppl")
        with pytest.raises(Cut):
            run(config(*RECOVER), tmp_path)
    ran = stages_run(monkeypatch)
    run(config(*RECOVER, "recovery.lr=1e-2"), tmp_path)
    assert ran == ["recover", "recovered/size", "recovered/ppl", "save"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["recovery=lora_text", "recovery.validation_size=100000"], "possible: 0 to"),
        (["recovery=perp", "recovery.dataset=text", "recovery.max_length=64"], "no example of"),
        (["recovery=transfer", "recovery.dataset=text", "recovery.max_length=64"], "no example"),
        (["recovery=distill", "recovery.dataset=alpaca"], "has no field"),
        (["recovery=reconstruct", "recovery.dataset=text", "recovery.length=8"], "samples=128"),
        (COMPRESSO, "has no field"),
        (["eval=generation"], "chat=false is plain text"),
        (["eval=kick", "~eval.tasks", "~eval.answers"], "chat=false is plain text"),
    ],
    ids=["lora", "perp", "transfer", "distill", "reconstruct", "compresso", "answers", "questions"],
)
def test_what_cannot_be_done_with_the_tokenizer_is_said_before_a_weight_is_read(
    words, says, half, tmp_path, monkeypatch
):
    text = tmp_path / "mine.jsonl"
    text.write_text('{"text": "too little to learn from"}')
    if words[0].startswith(("recovery=", "pruner=")) and "lora" not in words[0]:
        words = [*words, f"{words[0].partition('=')[0]}.path={text}"]
    ran = stages_run(monkeypatch)
    with pytest.raises(ConfigError, match=says):
        run(config(*words, "model=hf", f"model.path={half}"), tmp_path / "out")
    assert ran == []
    with pytest.raises(ConfigError, match=says):
        run(config(*words), tmp_path / "later")  # its tokenizer comes with the weights
    assert ran == ["load"]


def test_stages_of_another_text_are_not_taken_up(tmp_path, monkeypatch):
    text = tmp_path / "some.txt"
    text.write_text("the quick brown fox jumps over the lazy dog again and again. " * 9)
    cfg = config("calib=text", f"calib.path={text}")
    with monkeypatch.context() as patch:
        cut_off(patch, "pruned/ppl")
        with pytest.raises(Cut):
            run(cfg, tmp_path / "out")
    text.write_text("a lazy dog sleeps. " * 29)
    ran = stages_run(monkeypatch)
    record = run(cfg, tmp_path / "out")
    assert "prune" in ran
    assert record["provenance"]["files"][0][0] == str(text)


def test_a_damaged_stage_is_made_anew_with_one_line(tmp_path, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        cut_off(patch, "pruned/ppl")
        with pytest.raises(Cut):
            run(config(), tmp_path)
    [weights_file] = (tmp_path / "stages").glob("*/pruned/model.safetensors")
    weights_file.write_bytes(weights_file.read_bytes()[:-1])
    ran = stages_run(monkeypatch)
    run(config(), tmp_path)
    assert "prune" in ran
    assert "stage pruned is made anew" in caplog.text


def test_what_is_kept_says_with_which_words_a_run_goes_on(tmp_path, caplog):
    caplog.set_level("INFO", "prunekit")
    failures = []
    run_job(config() | {"out": str(tmp_path)}, failures)
    assert failures == []
    assert f"the same command with hydra.run.dir={tmp_path} goes on from there" in caplog.text


def test_stages_stay_where_they_are_asked_for(tmp_path):
    run(config("keep_stages=true"), tmp_path)
    assert list((tmp_path / "stages").glob("*/pruned/pruning.json"))


def test_without_a_checkpoint_numbers_alone_are_kept(tmp_path, monkeypatch):
    cfg = config("save=false")
    with monkeypatch.context() as patch:
        cut_off(patch, "pruned/ppl")
        with pytest.raises(Cut):
            run(cfg, tmp_path)
    assert not list((tmp_path / "stages").glob("*/pruned"))
    ran = stages_run(monkeypatch)
    run(cfg, tmp_path)
    assert "dense/ppl" not in ran
    assert "prune" in ran


def test_pruning_goes_on_with_the_block_at_which_it_was(tmp_path, monkeypatch, caplog):
    """As by a kill: nothing is tidied up."""
    caplog.set_level("INFO", "prunekit")
    wanda = ("pruner=unstructured", "criterion=wanda", "ratio.of=prunable", "ratio.target=0.5")
    monkeypatch.setattr(done_blocks, "SECONDS", 0.0)
    monkeypatch.setenv("PRUNEKIT_CACHE", str(tmp_path / "cache"))
    expected = run(config(*wanda), tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(DoneBlocks, "once", cut_in_block(1))
        with pytest.raises(Cut):
            run(config(*wanda), tmp_path / "cut")
    found = run(config(*wanda), tmp_path / "cut")
    assert "1 blocks were done: going on with block 1" in caplog.text
    assert numbers(found) == numbers(expected)
    whole, again = (weights(tmp_path / name) for name in ("whole", "cut"))
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert not (tmp_path / "cut" / "stages").exists()


def cut_in_block(number):
    real = DoneBlocks.once

    def once(self, model, block, compute, changes):
        if block == number:
            raise Cut
        return real(self, model, block, compute, changes)

    return once


def test_groups_come_back_as_they_were():
    member = Member("a.weight", 1, torch.arange(6).view(3, 2), True)
    group = Group("heads.0", "heads", 0, 3, (member,), whole="x")
    again = restored(json.loads(json.dumps(described(group))), {"index:heads.0:0": member.index})
    assert described(again) == described(group)
    assert torch.equal(again.members[0].index, member.index)
    block = Group("blocks", "blocks", None, 2, modules=("a", "b"))
    assert described(restored(json.loads(json.dumps(described(block))), {})) == described(block)


def test_a_name_is_one_file(tmp_path):
    done = Finished(tmp_path, config(), models=True)
    assert done.numbers("dense/a b", lambda: {"x": 1}) == ({"x": 1}, False)
    assert done.numbers("dense/a b", lambda: {"x": 2}) == ({"x": 1}, True)


def test_what_a_sweeper_minimises_decides_no_number():
    asked = {"seed": 0, "objective": None}
    assert result_key(asked) == result_key(asked | {"objective": "pruned/params"})
    assert result_key(asked) != result_key(asked | {"seed": 1})
