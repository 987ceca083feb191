"""The documentation's table of methods is what the registries say."""

from __future__ import annotations

from paths import ROOT

from prunekit.cli.list import main, methods_table, presets
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
