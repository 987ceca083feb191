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


def rows(results: dict) -> dict[str, list[str]]:
    lines = [line.strip("│").split("│") for line in printed(results, config()) if "│" in line]
    return {name.strip(): [text.strip() for text in texts] for name, *texts in lines}


def test_zeros_are_told_where_pruning_made_them():
    dense = {"dense/params": 200, "dense/params_nonzero": 199}
    assert "not zero" not in rows(dense)
    assert "not zero" not in rows(dense | {"pruned/params": 100, "pruned/params_nonzero": 99.5})
    found = rows(dense | {"pruned/params": 200, "pruned/params_nonzero": 100})
    assert found["not zero"] == ["199", "100 (50.3%)"]


def test_all_of_quality_that_the_report_shows_is_there():
    found = rows(
        {
            "dense/params": 200,
            "pruned/ppl_unseen_1024_to_dense": 3.8,
            "pruned/ppl_c4_128": 2e6,
            "pruned/kl_in_128": 0.3,
            "pruned/acc_norm_hellaswag": 0.5,
            "pruned/flips_mean": 0.12,
            "pruned/flips_mean_stderr": 0.01,
            "pruned/pass@1_humaneval": 0.3,
            "pruned/loss_of_its_own": 1.0,
        }
    )
    assert {name: texts[-1] for name, texts in found.items()} == {
        "parameters": "-",
        "perplexity unseen, window 1024, times dense": "3.80",
        "perplexity c4, window 128": "2.00e+06",
        "KL in@128": "0.300",
        "accuracy (norm) hellaswag": "0.500",
        "flips (%)": "12.00 ± 1.00",
        "pass@1 humaneval (%)": "30.00",
    }
