"""A saved checkpoint is recovered and measured as the run that made it would have."""

from __future__ import annotations

import json

import pytest
import torch
from compositions import config
from tiny_models import tiny_model

from prunekit.checkpoint import load
from prunekit.checkpoint.replay import replay
from prunekit.cli.main import main
from prunekit.errors import ConfigError
from prunekit.models.tiny import byte_tokenizer
from prunekit.runner.again import check_dense, configured, dense_model, made_of, run_again, zeros
from prunekit.runner.finished import Finished
from prunekit.runner.inputs import inputs
from prunekit.runner.run import run

QUICK = ("track=silent", "eval=quick")
TUNED = ("recovery=lora_text", "recovery.max_steps=2", "recovery.max_length=32")


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruned")
    return run(config(), folder), folder / "checkpoint"


def result(folder):
    return json.loads((folder / "result.json").read_text())


def test_the_numbers_are_those_of_the_run(pruned, tmp_path, capsys):
    assert main(["eval", str(pruned[1]), *QUICK, "--to", str(tmp_path / "out")]) == 0
    found = result(tmp_path / "out")
    ours = {k: v for k, v in pruned[0]["results"].items() if k.startswith("pruned/")}
    assert found["results"] == ours
    assert found["kept"] == pruned[0]["kept"]
    assert found["config"]["ratio"] == pruned[0]["config"]["ratio"]
    assert "perplexity pydocs" in capsys.readouterr().out
    assert "measuring ppl" in (tmp_path / "out" / "run.log").read_text()


def test_a_checkpoint_is_recovered_as_the_run_would_have(pruned, tmp_path):
    words = [str(pruned[1]), *QUICK, *TUNED]
    assert main(["recover", *words, "--to", str(tmp_path / "out")]) == 0
    whole = run(config(*TUNED), tmp_path / "whole")
    found = result(tmp_path / "out")
    assert {k: v for k, v in whole["results"].items() if not k.startswith("dense/")} == found[
        "results"
    ]
    ours, theirs = (load(tmp_path / n / "checkpoint")[0].state_dict() for n in ("out", "whole"))
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


@pytest.mark.parametrize("recovery", ["distill", "reconstruct"])
def test_what_learns_from_the_dense_model_learns_from_the_one_that_was_pruned(
    pruned, recovery, tmp_path
):
    given = {
        "distill": ["max_steps=2", "max_length=32", "validation_size=0", "lr=1e-2"],
        "reconstruct": ["samples=4", "length=32"],
    }
    words = [f"recovery={recovery}", "recovery.dataset=pydocs"]
    words += [f"recovery.{word}" for word in given[recovery]]
    assert main(["recover", str(pruned[1]), *QUICK, *words, "--to", str(tmp_path / "out")]) == 0
    whole = run(config(*words), tmp_path / "whole")
    found = result(tmp_path / "out")["results"]
    assert {k: v for k, v in whole["results"].items() if not k.startswith("dense/")} == found
    assert found["recovered/ppl_pydocs_32"] != found["pruned/ppl_pydocs_32"]
    kept = [
        json.loads((folder / "pruning.json").read_text())["config"]["model"]
        for folder in (pruned[1], tmp_path / "out" / "checkpoint")
    ]
    assert kept[0] == kept[1]


def test_it_is_loaded_as_the_command_says(pruned, tmp_path):
    words = [str(pruned[1]), "track=silent", "eval=statistics", "~eval.latency", "~eval.memory"]
    words += ["model.device=cpu", "model.dtype=bfloat16"]
    assert main(["eval", *words, "--to", str(tmp_path / "out")]) == 0
    found = result(tmp_path / "out")
    whole = pruned[0]["results"]["pruned/weights_mib"]
    assert found["results"]["pruned/weights_mib"] == whole / 2
    assert found["config"]["model"]["dtype"] == "bfloat16"


def test_the_dense_model_goes_where_the_command_says(pruned):
    assert dense_model(pruned[1]).options["device"] is None
    assert dense_model(pruned[1], "cpu").options["device"] == "cpu"


def test_folders_of_a_sweep_over_values_are_named_like_overrides(pruned, tmp_path):
    folder = tmp_path / "ratio.target=0.3_seed=0"
    folder.symlink_to(pruned[1].parent)
    path = str(folder / "checkpoint")
    assert main(["eval", path, *QUICK, "--to", str(tmp_path / "out")]) == 0


def test_the_dense_model_is_the_same_from_every_folder_and_missed_at_once(tmp_path, monkeypatch):
    tiny_model("llama", layers=2, vocab_size=259).save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    monkeypatch.chdir(tmp_path)
    run(config("model=hf", "model.path=./dense"), tmp_path / "pruned")
    path = tmp_path / "pruned" / "checkpoint"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    check_dense(path, None)
    files = inputs(made_of(path))
    assert str(tmp_path / "dense" / "config.json") in [file for file, *_ in files]
    assert Finished(tmp_path, config(), True, files).key != Finished(tmp_path, config(), True).key
    (tmp_path / "dense").rename(tmp_path / "gone")
    with pytest.raises(ConfigError, match="was made of is needed: .*no such folder"):
        run_again(configured(config("recovery=distill"), path), tmp_path / "out", recover=True)
    assert not (tmp_path / "out").exists()


def test_results_of_others_are_not_replaced_and_its_own_may_be(pruned, tmp_path, capsys):
    words = ["eval", str(pruned[1]), *QUICK, "--to"]
    before = (pruned[1].parent / "result.json").read_bytes()
    for folder in (pruned[1].parent, pruned[1]):
        assert main([*words, str(folder)]) == 2
        assert "holds the checkpoint itself" in capsys.readouterr().err
    assert (pruned[1].parent / "result.json").read_bytes() == before
    assert main([*words, str(tmp_path)]) == 0
    assert main([*words, str(tmp_path)]) == 0
    assert main([*words, str(tmp_path), "eval.ppl.window=16"]) == 2
    assert "the result of another command" in capsys.readouterr().err


def test_what_another_command_has_done_so_far_is_not_lost(pruned, tmp_path, capsys):
    kept = tmp_path / "stages" / "ofanother" / "pruned"
    kept.mkdir(parents=True)
    words = ["eval", str(pruned[1]), *QUICK, "--to", str(tmp_path)]
    assert main(words) == 2
    assert "has done so far, which would be lost" in capsys.readouterr().err
    assert kept.is_dir()


def test_a_repeat_that_succeeds_is_no_failure(pruned, tmp_path):
    (tmp_path / "failed.txt").write_text("RuntimeError: the other time")
    assert main(["eval", str(pruned[1]), *QUICK, "--to", str(tmp_path)]) == 0
    assert not (tmp_path / "failed.txt").exists()


def test_stages_are_kept_where_asked_for(pruned, tmp_path):
    words = ["eval", str(pruned[1]), *QUICK, "--to"]
    assert main([*words, str(tmp_path / "dropped")]) == 0
    assert not (tmp_path / "dropped" / "stages").exists()
    assert main([*words, str(tmp_path / "kept"), "keep_stages=true"]) == 0
    assert list((tmp_path / "kept" / "stages").rglob("pruned-*"))


def test_zeros_of_a_checkpoint_stay_zero(tmp_path):
    words = ["pruner=unstructured", "criterion=weight_magnitude", "ratio.of=prunable"]
    run(config(*words), tmp_path / "pruned")
    path = tmp_path / "pruned" / "checkpoint"
    before = zeros(load(path)[0])[1]
    assert before
    assert main(["recover", str(path), *QUICK, *TUNED, "--to", str(tmp_path / "out")]) == 0
    after = load(tmp_path / "out" / "checkpoint")[0]
    for name, free in before.items():
        assert not after.get_parameter(name.removeprefix("weights."))[~free].any()


HALF = ("pruner=unstructured", "criterion=weight_magnitude", "ratio.of=prunable")
LEARNS = ("recovery=transfer", "recovery.dataset=pydocs", "recovery.max_steps=1")
LEARNS += ("recovery.max_length=32", "recovery.lr=1e-2")


def test_single_weights_are_still_told_after_a_recovery(tmp_path):
    whole = run(config(*HALF, *TUNED), tmp_path / "whole")
    run(config(*HALF), tmp_path / "pruned")
    path = str(tmp_path / "pruned" / "checkpoint")
    assert main(["recover", path, *QUICK, *TUNED, "--to", str(tmp_path / "out")]) == 0
    assert result(tmp_path / "out")["kept"] == whole["kept"]
    again = tmp_path / "out" / "checkpoint"
    with pytest.raises(ConfigError, match="whose zeros are in the checkpoint's tensors only"):
        replay(load(path)[0], again)
    assert main(["recover", str(again), *QUICK, *LEARNS, "--to", str(tmp_path / "last")]) == 0
    assert result(tmp_path / "last")["kept"] == whole["kept"]


def test_merged_blocks_are_still_told_after_a_recovery(tmp_path):
    words = ["pruner=laco", "criterion=none", "ratio.of=units", "ratio.target=0.25"]
    run(config(*words), tmp_path / "pruned")
    path = tmp_path / "pruned" / "checkpoint"
    assert main(["recover", str(path), *QUICK, *TUNED, "--to", str(tmp_path / "out")]) == 0
    made = [
        replay(dense_model(path)()[0], folder).state_dict()
        for folder in (path, tmp_path / "out" / "checkpoint")
    ]
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_units_that_were_cut_out_are_no_zeros_to_learn_around(pruned, tmp_path, capsys):
    words = [str(pruned[1]), *QUICK, *LEARNS, "recovery.arm=frozen"]
    assert main(["recover", *words, "--to", str(tmp_path / "out")]) == 2
    assert "units were cut out" in capsys.readouterr().err


def test_what_a_recovery_gives_back_is_kept(tmp_path):
    run(config("pruner.remove=false"), tmp_path / "pruned")
    words = [str(tmp_path / "pruned" / "checkpoint"), *QUICK, *LEARNS, "recovery.arm=dense"]
    assert main(["recover", *words, "--to", str(tmp_path / "out")]) == 0
    assert all(kept == of for kept, of in result(tmp_path / "out")["kept"].values())


def test_zeros_of_stacked_experts_are_found_and_padding_is_none():
    model = tiny_model("mixtral")
    stack = "model.layers.0.mlp.experts.down_proj"
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = 0
        model.get_parameter(stack)[0, 0, 0] = 0
    groups, kept = zeros(model)
    assert [g.matrix for g in groups] == [stack]
    assert torch.equal(kept[groups[0].name], model.get_parameter(stack) != 0)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["eval"], "needs the folder of a checkpoint"),
        (["recover", "recovery=lora"], "first word, and 'recovery=lora' is no folder"),
        (["eval", "PATH", "eval=none"], "needs an eval"),
        (["recover", "PATH", *QUICK], "needs a recovery"),
        (["recover", "PATH", *QUICK, *TUNED, "recovery.batch=7"], "no multiple of micro_batch"),
        (["eval", "PATH", *QUICK, "eval.ppl.window=4096"], "2048 positions"),
        (["eval", "PATH", *QUICK, "seed=1,2"], "one configuration at a time"),
        (["eval", "/no/such", *QUICK], "is not a folder"),
        (["eval", "PATH", "--to"], "--to needs a folder"),
        (["recover", "PATH", *TUNED, "ratio.target=0.5"], "the checkpoint says that itself"),
        (["eval", "PATH", *QUICK, "calib=pydocs"], "the checkpoint says that itself"),
        (["eval", "PATH", *QUICK, "model=tiny_llama"], "possible: recovery, eval, model.device"),
        (["eval", "PATH", *QUICK, "hydra.run.dir=there"], "--to FOLDER says where"),
        (["eval", "PATH", *QUICK, "out=there"], "--to FOLDER says where"),
        (["eval", "PATH", *QUICK, "-m"], "no flag '-m' here; possible: overrides such as"),
        (["plan", "--json"], "no flag '--json' here; possible: overrides such as"),
    ],
)
def test_what_cannot_be_is_said(pruned, words, says, capsys):
    assert main([w.replace("PATH", str(pruned[1])) for w in words]) == 2
    assert says in capsys.readouterr().err


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"pruning\.json is missing"):
        configured({}, tmp_path)
