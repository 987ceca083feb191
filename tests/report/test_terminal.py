"""The report on consoles of any width: no number is cut."""

from __future__ import annotations

import io

import pytest
from fakes import config, result, stages
from rich.console import Console

from prunekit.report.load import load
from prunekit.report.table import report_tables
from prunekit.report.terminal import in_turns, show

TEXTS = ("wikitext2", "ptb", "c4", "dialogue", "news", "novel", "pubmed")


def table_of(folder):
    for seed in (0, 1):
        numbers = stages(12.6, 20.0) | {
            f"{stage}/ppl_{text}_1024": 123.45 + 10 * i + seed
            for i, text in enumerate(TEXTS)
            for stage in ("dense", "pruned")
        }
        result(folder / str(seed), numbers, config(seed=seed, calib__seed=seed))
    found = load([folder])
    return report_tables(found), found


def shown(tables, found, **how):
    file = io.StringIO()
    show(tables, found, Console(file=file, color_system=None, **how))
    return file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_terminal_shows_every_number_whole(tmp_path, width):
    tables, found = table_of(tmp_path)
    text = shown(tables, found, width=width, force_terminal=True)
    assert max(map(len, text.splitlines())) <= width
    for i, name in enumerate(TEXTS):
        assert f"{name}@1024" in text
        assert f"{123.95 + 10 * i:.2f}" in text
    titles = [line for line in text.splitlines() if line.startswith("results")]
    assert len(titles) == len(in_turns(tables[0], width))
    assert ("…" in text) is False


def test_a_narrow_terminal_has_one_column_a_table(tmp_path):
    [table], _ = table_of(tmp_path)
    assert [len(columns) for columns in in_turns(table, 1)] == [1] * len(table.columns)


def test_a_pipe_takes_all_columns_side_by_side(tmp_path):
    text = shown(*table_of(tmp_path), width=80, force_terminal=False)
    [line] = [line for line in text.splitlines() if "wikitext2@1024" in line]
    assert all(f"{name}@1024" in line for name in TEXTS)
