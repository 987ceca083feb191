"""What Hydra would refuse in its own words is said in two lines, before Hydra starts."""

from __future__ import annotations

import pytest

from prunekit.cli.main import main

BAD = {
    "ratio.target=0.1,0.2": ("ratio.target=0.1,0.2 is a list of values", "-m runs all of them"),
    "ratio.target={": ("", "quoted"),
    "ratio.target=${nowhere}": ("nowhere", "prunekit --cfg job"),
    "criterion=tailor": ("Could not find 'criterion/tailor'", "taylor"),
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
