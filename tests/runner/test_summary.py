"""The table at the end of a run."""

from __future__ import annotations

import io
from pathlib import Path

from fakes import config
from rich.console import Console

from prunekit.runner.summary import show, title


def printed(results: dict, cfg: dict) -> list[str]:
    console = Console(width=100, file=io.StringIO())
    show({"results": results, "config": cfg, "checkpoint": None}, Path("somewhere"), console)
    return console.file.getvalue().splitlines()


def test_title_names_what_was_chosen_and_stays_on_one_line():
    assert title(config()) == "tiny_llama, taylor, 20% of units"
    own = config(pruner__name="obs", criterion__name="none", recovery__name="lora")
    assert title(own) == "tiny_llama, obs, 20% of units, recovery lora"
    assert printed({"dense/params": 10}, own)[0] == title(own)


def test_a_part_that_a_plain_configuration_leaves_out_is_not_named():
    assert title(config(criterion=None, ratio=None, recovery=None)) == "tiny_llama"


def test_a_run_that_measured_nothing_says_so():
    lines = printed({}, config())
    assert lines[:2] == [
        "tiny_llama, taylor, 20% of units",
        "nothing was measured that this table shows",
    ]
    assert lines[-1].endswith("result.json")


def test_shares_of_dense_stand_beside_sizes():
    lines = printed(
        {
            "dense/params": 200,
            "pruned/params": 150,
            "pruned/ppl_pydocs_32": 7.0,
            "pruned/ppl_pydocs_32_stderr": 0.5,
        },
        config(),
    )
    text = "\n".join(lines)
    assert "150 (75.0%)" in text
    assert "7.00 ± 0.50" in text
