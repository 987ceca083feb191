"""Every table of the paper is an experiment that composes, at full scale and in little, and whose
rows are the paper's.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from prunekit.cli.compose import composed
from prunekit.cli.main import conf_dir, one_experiment_each
from prunekit.report.paper import paper
from prunekit.runner.preflight import check

FOLDER = conf_dir() / "experiment" / "llm_pruner"
TABLES = [f"table{n}" for n in (*range(1, 11), *range(12, 18))]
FINDINGS = ["layer_sensitivity", "ratio_sweep", "calibration_samples", "dependency"]
NO_TWIN = {"table2", "table4", "table5", "table17"}
"""Tables that differ from another one only in the model."""


def test_there_is_an_experiment_for_every_table_and_finding():
    assert {p.stem for p in FOLDER.glob("*.yaml")} == {"common", *TABLES, *FINDINGS}
    for name in (*TABLES, *FINDINGS):
        assert (Path(FOLDER).parents[2] / "experiments" / "llm_pruner" / name).is_dir(), name


@pytest.mark.parametrize("name", [*TABLES, *FINDINGS])
def test_its_rows_compose_and_are_the_papers(name):
    jobs = list(composed([f"experiment=llm_pruner/{name}"]))
    assert jobs
    numbers = paper(f"llm_pruner/{name}")
    for cfg in jobs:
        assert cfg["table"] == f"llm_pruner/{name}"
        if numbers:
            known = {method for method, _ in numbers.rows}
            assert cfg["row"] in known, f"{cfg['row']!r} is no row of {name}: {known}"
    if numbers:
        missing = {m for m, _ in numbers.rows if not m.startswith("dense") and "int8" not in m} - {
            c["row"] for c in jobs
        }
        assert not missing


@pytest.mark.parametrize("name", [n for n in (*TABLES, *FINDINGS) if n not in NO_TWIN])
def test_its_small_twin_passes_every_check_that_needs_no_weight(name, shared):
    words = [f"experiment=llm_pruner/{name}", "scale=small", f"data_root={shared / 'data'}"]
    models = set()
    for cfg in composed(words):
        check(cfg)
        models.add(cfg["model"]["name"])
    assert models == {"smollm2_135m"}


def test_the_fifty_percent_tables_are_the_layers_that_the_papers_counts_need():
    cfg = next(iter(composed(["experiment=llm_pruner/table16", "row=Element1"])))
    assert cfg["exclude"] == {"name": "range", "heads": [3, 31], "neurons": [3, 31], "blocks": None}
    assert cfg["ratio"]["target"] == 0.6


def test_what_the_paper_does_not_tune_is_not_tuned():
    tuned = {
        cfg["row"]: cfg["recovery"]["name"] for cfg in composed(["experiment=llm_pruner/table1"])
    }
    assert tuned == {
        "L2": "none",
        "Random": "none",
        "Channel": "lora",
        "Vector": "lora",
        "Element2": "lora",
        "Element1": "lora",
    }


def test_a_layer_at_a_time_is_one_job_a_layer():
    jobs = list(composed(["experiment=llm_pruner/layer_sensitivity", "scale=small"]))
    assert [cfg["exclude"]["neurons"] for cfg in jobs] == [[i, i + 1] for i in range(30)]
    assert all(cfg["exclude"]["heads"] == cfg["exclude"]["neurons"] for cfg in jobs)


def test_several_experiments_are_several_tables():
    assert one_experiment_each(["experiment=a,b", "scale=small"]) == [
        ["experiment=a", "scale=small"],
        ["experiment=b", "scale=small"],
    ]
    assert one_experiment_each(["-m", "seed=0,1"]) == [["-m", "seed=0,1"]]


@pytest.mark.parametrize("path", sorted((conf_dir() / "experiment" / "peers").glob("*.yaml")))
def test_the_peers_experiments_read_text_that_was_not_calibrated_on_and_tasks(path):
    (cfg,) = composed([f"experiment=peers/{path.stem}", "data_root=/data"])
    domains, tasks = cfg["eval"]["domains"], cfg["eval"]["zeroshot"]["tasks"]
    assert {"ptb", "c4", "dialogue"} <= set(domains["texts"])
    assert set(domains["seen"]) == ({"ptb", "c4"} if path.stem == "copal" else set())
    assert tasks == ["docs_cloze", "arc_easy", "piqa"]


@pytest.mark.parametrize("evals", ["quick", "none", "paper"])
def test_the_demo_takes_another_evaluation(evals):
    [cfg] = composed(["experiment=demo", f"eval={evals}"])
    assert all("name" in node for node in (cfg["eval"] or {}).values())


def test_the_demo_reads_a_part():
    [cfg] = composed(["experiment=demo"])
    assert (cfg["eval"]["ppl"]["limit"], cfg["eval"]["zeroshot"]["limit"]) == (64, 50)
    assert {"size", "macs", "memory", "latency"} < cfg["eval"].keys()
