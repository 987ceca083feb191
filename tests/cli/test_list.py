"""The documentation's table of methods is what the registries say."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from paths import ROOT

from prunekit.cli.list import main, methods_table, presets
from prunekit.errors import ConfigError
from prunekit.registry import REGISTRIES


def test_the_documentation_has_the_methods_that_there_are():
    text = (ROOT / "docs" / "methods.md").read_text()
    assert (
        text.split("<!-- methods -->\n")[1].split("<!-- /methods -->")[0].strip()
        == methods_table().strip()
    ), (
        "docs/methods.md is stale: paste the output of `prunekit list --markdown` between its "
        "markers"
    )


def test_every_yaml_of_a_kind_is_listed(capsys):
    for kind, registry in REGISTRIES.items():
        told = set(registry.names()) | {name for name, _, _ in presets(kind)}
        assert told >= {p.stem for p in (ROOT / "conf" / kind).glob("*.yaml")}
    by_name = {name: (summary, said) for name, summary, said in presets("model")}
    assert by_name["llama_7b"][0].startswith("LLaMA-7B")
    assert "path=huggyllama/llama-7b" in by_name["llama_7b"][1]
    assert main(["model"]) == 0
    assert "vicuna_7b" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["criterion", "taylor"], ["criterion=taylor"]])
def test_one_component_is_shown_with_what_its_options_mean(words, capsys):
    assert main(words) == 0
    said = capsys.readouterr().out
    assert said.startswith("Change of the loss when a unit goes")
    assert "paper: arXiv 2305.11627, year: 2023, needs: gradients" in said
    assert "conf/criterion/taylor.yaml: criterion.OPTION=VALUE" in said
    assert "mode: param_first   # vectorize |" in said


def test_what_is_built_on_other_yamls_is_shown_with_them(capsys):
    assert main(["eval", "paper"]) == 0
    said = capsys.readouterr().out
    assert said.count("name: perplexity") == 1
    assert "perplexity.yaml: eval.wikitext2.OPTION=VALUE, eval.ptb.OPTION=VALUE" in said


def test_experiments_are_listed_and_shown_when_asked_for(capsys):
    assert main(["experiment"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "llm_pruner/table6 Table 6: what the dependency is worth." in said
    assert main(["experiment", "llm_pruner/table6"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("--- conf/experiment/llm_pruner/table6.yaml\n")
    assert "--- conf/experiment/llm_pruner/common.yaml\n" in said


def test_a_reader_that_stops_early_sees_no_traceback():
    gone, end = os.pipe()
    os.close(gone)
    asked = [sys.executable, "-m", "prunekit", "list", "criterion", "taylor"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(asked, stdout=end, stderr=subprocess.PIPE, env=env, text=True)
    os.close(end)
    assert done.stderr == ""


def test_what_is_not_there_to_list_is_answered_with_what_is():
    with pytest.raises(ConfigError, match=r"kinds: model, .*\n.*`prunekit list criterion taylor`"):
        main(["taylor"])
    with pytest.raises(ConfigError, match=r"no criterion called 'tailor'.*\n.*criterion=taylor"):
        main(["criterion", "tailor"])
