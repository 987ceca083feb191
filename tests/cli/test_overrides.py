"""What Hydra would refuse in its own words is said in two lines, before Hydra starts."""

from __future__ import annotations

import pytest

import prunekit
from prunekit.cli.main import flags_first, main
from prunekit.cli.overrides import check_composition

BAD = {
    "ratio.target=0.1,0.2": ("ratio.target=0.1,0.2 is a list of values", "-m runs all of them"),
    "ratio.target={": ("", "quoted"),
    "ratio.target=${nowhere}": ("nowhere", "prunekit --cfg job"),
    "criterion=tailor": ("no criterion called 'tailor'; possible: aimer", "mean criterion=taylor?"),
    "pruner=wanda": ("no pruner called 'wanda'; possible: adainfer", "mean criterion=wanda?"),
    "experiment=table6": ("llm_pruner/table6, ", "mean experiment=llm_pruner/table6?"),
    "eval=[quick,nothing]": ("no eval called 'nothing'", "possible: answers, default"),
    "ratio=0.3": ("ratio=0.3 must be a name; possible: besa, ", "ratio.KEY=0.3"),
    "exclude.heads=[0,4]": ("exclude (ends) has no key 'heads'", "exclude=range has it"),
    "model.path=x": ("model (tiny_llama) has no key 'path'", "hint: model=hf, "),
    "device=cuda": ("the config has no key 'device'", "mean model.device?"),
    "calib.sampels=3": ("calib (crop) has no key 'sampels'", "mean calib.samples?"),
    "--ratio": ("no flag '--ratio'", "ratio.target=0.3"),
    "=": ("an override is one word: key=value", ""),
    "prune": ("no command 'prune'; there are: eval, ", "ratio.target=0.3"),
    "taylor": ("no command 'taylor'", "did you mean criterion=taylor?"),
    "reprot": ("no command 'reprot'", "did you mean report"),
    "taylor=1": ("the config has no key 'taylor'", "did you mean criterion=taylor?"),
    "criterion.wanda=1": ("criterion (taylor) has no key 'wanda'", "did you mean criterion=wanda?"),
    "accelerate=fsdp2": ("the config has no key 'accelerate'", "possible: seed"),
    "criterion=null": ("criterion=null must be a name; possible: ", "mean criterion=none?"),
    "calib=null": ("calib=null must be a name; possible: bookcorpus, ", ""),
    "model=gpt2": ("no model called 'gpt2'", "mean model=hf model.path=gpt2?"),
    "model=./llama_7b": (
        "no model called",
        "mean model=hf model.path=./llama_7b or model=llama_7b",
    ),
    "calib=my.jsonl": ("no calib called 'my.jsonl'", "mean calib=text calib.path=my.jsonl?"),
    "criterion=[l1,l2]": ("criterion=[l1,l2] lists 2, and one can", "-m criterion=l1,l2 runs"),
    "eval=[size,needle]": ("lists 2", "eval=none +eval@eval.size=size +eval@eval.needle=needle"),
    "eval=[quick,needle]": ("lists 2", "suites can be listed"),
    "+eval.extra.limit=4": ("eval.extra has options but no evaluation", "+eval@eval.extra="),
    "ratio.tarjet=0.2": ("ratio (uniform) has no key 'tarjet'", "possible: "),
    "ratio.target.x=1": ("has no key 'x'", "possible: none"),
    "row=L2": ("row=... is for the table of an experiment", "experiment="),
    "scale=small": ("scale=... is for the table of an experiment", "experiment="),
    "table=llm_pruner/table1": ("table=... is for the table", "experiment="),
    "base={ratio.target:0.1}": ("base=... is for the jobs of a sweep", "key=value"),
    "rows={a:{seed:1}}": ("rows=... is for the jobs of a sweep", "-m"),
    "~ratio.tarjet": ("tarjet", ""),
    "+ratio=uniform": ("ratio", ""),
    "hydra.run.dirr=x": ("dirr", ""),
    "out=there": ("out=there: give hydra.run.dir=FOLDER", ""),
}


@pytest.mark.parametrize("word", BAD)
def test_two_lines_say_what_is_wrong_and_what_helps(word, capsys, monkeypatch):
    monkeypatch.setattr("hydra.main", lambda **_: pytest.fail("Hydra was started"))
    assert main(["model=tiny_llama", word]) == 2
    said = capsys.readouterr().err
    assert said.startswith("prunekit: ")
    assert len(said.strip().splitlines()) <= 2
    for words in BAD[word]:
        assert words in said


def test_one_more_evaluation_leaves_the_others(capsys):
    words = ["+eval@eval.more=perplexity", "eval.ppl.limit=3", "eval.more.limit=2"]
    assert main(["--cfg", "job", "-p", "eval", "eval=quick", *words]) == 0
    said = capsys.readouterr().out
    assert "limit: 3" in said
    assert "limit: 2" in said


def test_one_evaluation_alone_is_a_suite_of_one():
    from prunekit.cli.compose import composed

    words = ["model=tiny_llama", "eval=domains", "eval.limit=3", "eval.texts={a:{dataset:pydocs}}"]
    check_composition(words)
    (cfg,) = composed(words)
    assert list(cfg["eval"]) == ["domains"]
    assert cfg["eval"]["domains"]["name"] == "domains"
    assert cfg["eval"]["domains"]["limit"] == 3


def test_an_evaluation_beside_one_that_was_chosen_alone_is_refused(capsys):
    words = ["model=tiny_llama", "eval=perplexity", "+eval@eval.needle=needle"]
    assert main([*words, "eval.window=32"]) == 2
    said = capsys.readouterr().err
    assert "eval=perplexity is one evaluation alone, and eval.needle stands beside it" in said
    assert "eval=none +eval@eval.perplexity=perplexity +eval@eval.needle=needle measures" in said


def test_a_component_without_its_yaml_is_told_what_is_missing(tmp_path, monkeypatch, capsys):
    (tmp_path / "criteria").mkdir()
    source = "@criteria.register()\ndef mine(model, groups, run): ...\n"
    (tmp_path / "criteria" / "mine.py").write_text(source)
    monkeypatch.setenv("PRUNEKIT_COMPONENTS", str(tmp_path))
    assert main(["model=tiny_llama", "criterion=mine"]) == 2
    assert (
        "a file registers mine, and conf/criterion/mine.yaml is missing" in capsys.readouterr().err
    )


@pytest.mark.parametrize("command", ["plan", "recover"])
def test_a_bare_word_is_no_override_of_a_command(command, tmp_path, capsys):
    words = [str(tmp_path)] if command == "recover" else []
    assert main([command, *words, "taylor"]) == 2
    assert "'taylor' is no override, such as ratio.target=0.3" in capsys.readouterr().err


def test_a_home_that_is_nobodys_is_said(monkeypatch, capsys):
    assert main(["eval", "~nobody-of-that-name/checkpoint", "eval=quick"]) == 2
    assert "checkpoint: there is no such home folder" in capsys.readouterr().err
    monkeypatch.setenv("PRUNEKIT_COMPONENTS", "~nobody-of-that-name")
    assert main(["list", "criterion"]) == 2
    assert "there is no such home folder" in capsys.readouterr().err


def test_one_configuration_is_shown_not_several(capsys):
    assert main(["--cfg", "job", "-m", "seed=1,2"]) == 2
    assert "--cfg shows one configuration" in capsys.readouterr().err


def test_the_version_is_ours(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"prunekit {prunekit.__version__}\n"


def test_flags_may_stand_among_the_overrides():
    words = ["seed=1", "--cfg", "job", "-m", "ratio.target=0.1,0.2", "--resolve", "save=false"]
    flags = ["--cfg", "job", "-m", "--resolve"]
    assert flags_first(words) == [*flags, "seed=1", "ratio.target=0.1,0.2", "save=false"]
