"""What a table says of the machines and packages behind its numbers."""

from __future__ import annotations

from fakes import config, result, stages

from prunekit.report.formatting import remarks
from prunekit.report.load import load
from prunekit.report.table import report_tables

PLAIN = {"cpu": "AMD EPYC", "cores": 16, "threads": 2, "gpus": []}
CARDS = PLAIN | {"gpus": ["NVIDIA H200", "NVIDIA H200"]}


def said(folder, jobs):
    for i, (hardware, versions, model) in enumerate(jobs):
        cfg = config(seed=i, calib__seed=i, model=model)
        origin = {"seed": i, "code": "0", "hardware": hardware, "versions": versions}
        numbers = stages(12.6, 20.0 + i, 19.0)
        result(folder / str(i), numbers, cfg, provenance=origin)
    [table] = report_tables(load([folder]))
    return [line for line in remarks(table) if line.startswith(("Measured on", "Not all"))]


def test_one_machine_is_named(tmp_path):
    jobs = [(PLAIN, {"torch": "2.13.0"}, {"name": "hf", "path": "a"})] * 2
    assert said(tmp_path, jobs) == ["Measured on AMD EPYC, 2 threads."]


def test_machines_and_packages_that_differ_are_told_job_by_job(tmp_path):
    model = {"name": "hf", "path": "a"}
    cards = [(CARDS, {"torch": "2.13.0", "transformers": "5.22.0"}, model)] * 2
    plain = (CARDS, {"torch": "2.13.0", "transformers": "5.23.0"}, model | {"device": "cpu"})
    assert said(tmp_path, [*cards, plain]) == [
        "Measured on 2 jobs: 2 x NVIDIA H200; 1 job: AMD EPYC, 2 threads: compare seconds, "
        "latencies and peaks of one machine.",
        "Not all with the same transformers (2 jobs: 5.22.0; 1 job: 5.23.0): numbers may differ by "
        "that.",
    ]


def test_results_that_do_not_tell_are_passed_over(tmp_path):
    assert said(tmp_path, [({}, {}, {"name": "hf", "path": "a"})]) == []
