"""A saved checkpoint is recovered and measured as the run that made it would have."""

from __future__ import annotations

import json

import pytest
import torch
from compositions import config

from prunekit.checkpoint import load
from prunekit.cli.main import main
from prunekit.errors import ConfigError
from prunekit.runner.again import zeros
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


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["eval"], "needs the folder of a checkpoint"),
        (["recover", "recovery=lora"], "needs the folder of a checkpoint"),
        (["eval", "PATH", "eval=none"], "needs an eval"),
        (["recover", "PATH", *QUICK], "needs a recovery"),
        (["recover", "PATH", *QUICK, *TUNED, "recovery.batch=7"], "no multiple of micro_batch"),
        (["eval", "PATH", *QUICK, "eval.ppl.window=4096"], "2048 positions"),
        (["eval", "PATH", *QUICK, "seed=1,2"], "one configuration at a time"),
        (["eval", "/no/such", *QUICK], "is not a folder"),
        (["eval", "PATH", "--to"], "--to needs a folder"),
    ],
)
def test_what_cannot_be_is_said(pruned, words, says, capsys):
    assert main([w.replace("PATH", str(pruned[1])) for w in words]) == 2
    assert says in capsys.readouterr().err


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    from prunekit.runner.again import configured

    with pytest.raises(ConfigError, match=r"pruning\.json is missing"):
        configured({}, tmp_path)
