"""Results -> the table that every form of the report shows: rows with means over seeds, the paper's
numbers, the best of each block.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from prunekit.report.labels import names, seeds
from prunekit.report.load import STAGES, Found, Result
from prunekit.report.metrics import QUALITY, Column, ordered
from prunekit.report.paper import Paper, paper, same_model


@dataclass(frozen=True)
class Cell:
    """A mean in the column's unit; `spread` is the standard deviation over `n` seeds, or with one
    seed the metric's standard error.
    """

    mean: float | None = None
    spread: float | None = None
    n: int = 0
    paper: float | None = None
    best: bool = False

    def difference(self) -> float | None:
        """Ours less the paper's."""
        return None if self.mean is None or self.paper is None else self.mean - self.paper


@dataclass
class Row:
    """One line: what was done, how much of the model's parameters went or (`zeros`) is zero where
    none did, at which stage it was measured.
    """

    label: str
    stage: str
    ratio: float | None
    zeros: bool
    target: float | None
    cells: dict[str, Cell]
    results: list[Result]

    @property
    def block(self) -> tuple[str, float]:
        """Rows of one block compete for the best number: the same stage, about the same ratio."""
        return self.stage, round(self.target if self.target is not None else self.ratio or 0.0, 2)


@dataclass
class ReportTable:
    """One table of the report."""

    name: str
    title: str
    columns: list[Column]
    rows: list[Row]
    paper: Paper | None = None
    comparable: bool = False
    orders: dict[str, tuple[int, int]] = field(default_factory=dict)
    """column title -> (pairs of rows that stand in the paper's order, pairs of rows that both
    have).
    """


def report_tables(found: Found) -> list[ReportTable]:
    """One table for every experiment among the results; what belongs to none shares
    one, per model.
    """
    tables: dict[tuple[str, str], list[Result]] = {}
    for r in found.results:
        tables.setdefault((r.config.get("table") or "", model_name(r.config)), []).append(r)
    return [report_table(name, model, results) for (name, model), results in tables.items()]


def report_table(name: str, model: str, results: Sequence[Result]) -> ReportTable:
    """Rows in the order of the experiment's own list, dense first, then pruned, then recovered."""
    numbers = paper(name)
    keys = [k for r in results for stage in r.numbers.values() for k in stage]
    columns = ordered(keys)
    rows = rows_of(results, columns, numbers)
    for column in columns:
        mark_best(rows, column)
    title = f"{name}: {numbers.title}" if numbers else name or "results"
    found = ReportTable(name, f"{title} ({model})", columns, rows, numbers)
    if numbers:
        found.comparable = all(same_model(r.config, numbers.model) for r in results)
        found.orders = agreement(rows, columns)
    return found


def model_name(config: dict[str, Any]) -> str:
    """The path or the short name of a job's model."""
    return str(config["model"].get("path") or config["model"]["name"])


def rows_of(
    results: Sequence[Result], columns: Sequence[Column], numbers: Paper | None
) -> list[Row]:
    """Jobs that differ in their seed alone become one row a stage; all dense measurements are one
    row.
    """
    labels = names(results)
    grouped: dict[tuple[str, str, float | None], list[Result]] = {}
    for stage in STAGES:
        for label, r in zip(labels, results, strict=True):
            if stage in r.numbers:
                key = (label, stage, (r.config["ratio"] or {}).get("target"))
                if stage == "dense":
                    key = ("dense", stage, 0.0)
                grouped.setdefault(key, []).append(r)
    order = {label: i for i, label in enumerate(row_order(labels, numbers))}
    keys = sorted(grouped, key=lambda k: (STAGES.index(k[1]), k[2] or 0.0, order.get(k[0], 0)))
    return [row(*key, grouped[key], columns, numbers) for key in keys]


def row_order(labels: Sequence[str], numbers: Paper | None) -> list[str]:
    """Labels in the order of the paper's rows, then as found."""
    methods = list(dict.fromkeys(method for method, _ in numbers.rows)) if numbers else []
    ranks = {method: i for i, method in enumerate(methods)}
    return sorted(
        dict.fromkeys(labels),
        key=lambda label: ranks.get(label, ranks.get(label.split(", ")[0], len(ranks))),
    )


def row(
    label: str,
    stage: str,
    target: float | None,
    results: list[Result],
    columns: Sequence[Column],
    numbers: Paper | None,
) -> Row:
    """One line with its numbers and the paper's."""
    base = "dense" if stage == "dense" else results[0].config.get("row") or label
    theirs = numbers.numbers(base, stage == "recovered") if numbers else {}
    cells = {}
    for column in columns:
        # The dense model is the same in every job, and a job that was run again is the same job:
        # those that agree are one measurement, not many.
        told = {
            (
                r.numbers[stage].get(column.key),
                r.numbers[stage].get(f"{column.key}_stderr"),
                () if stage == "dense" else seeds(r.config),
            ): None
            for r in results
            if column.key in r.numbers[stage]
        }
        cell = summary([(value, error) for value, error, _ in told], column)
        cells[column.key] = Cell(cell.mean, cell.spread, cell.n, theirs.get(column.title))
    return Row(label, stage, *removed(results, stage), target, cells, results)


def summary(values: list[tuple[float | None, float | None]], column: Column) -> Cell:
    """Mean and spread of (value, standard error) pairs, in the column's unit, of jobs that measured
    it. A value that was not finite spoils the mean: no number.
    """
    if not values or any(v is None for v, _ in values):
        return Cell(n=len(values))
    shown = [v * column.scale for v, _ in values if v is not None]
    if len(shown) > 1:
        return Cell(statistics.fmean(shown), statistics.stdev(shown), len(shown))
    error = values[0][1]
    return Cell(shown[0], None if error is None else error * column.scale, 1)


def removed(results: Sequence[Result], stage: str) -> tuple[float | None, bool]:
    """Mean share of the parameters that went, as measured; and whether it is one of zeros, which
    count where nothing else went; biases that a pruner added may make it less than nothing.
    """
    gone = share_gone(results, stage, "params")
    zeros = share_gone(results, stage, "params_nonzero") or 0.0
    return (zeros, True) if gone is not None and gone <= 0 < zeros else (gone, False)


def share_gone(results: Sequence[Result], stage: str, key: str) -> float | None:
    """Mean share of the dense model's number under `key` that is there no longer."""
    pairs = [
        (r.numbers.get("dense", {}).get(key), r.numbers.get(stage, {}).get(key)) for r in results
    ]
    shares = [1 - now / dense for dense, now in pairs if dense and now]
    return statistics.fmean(shares) if shares else None


def mark_best(rows: Sequence[Row], column: Column) -> None:
    """In a column of quality the best of each block with at least two numbers; ties share the
    mark.
    """
    if not column.key.startswith(QUALITY):
        return
    blocks: dict[tuple[str, float], list[tuple[float, Row]]] = {}
    for r in rows:
        mean = r.cells[column.key].mean
        if mean is not None and math.isfinite(mean):
            blocks.setdefault(r.block, []).append((mean, r))
    for block in blocks.values():
        best = max(column.better * mean for mean, _ in block)
        for mean, r in block:
            if len(block) > 1 and column.better * mean == best:
                r.cells[column.key] = replace(r.cells[column.key], best=True)


def agreement(rows: Sequence[Row], columns: Sequence[Column]) -> dict[str, tuple[int, int]]:
    """For every column: how many of the pairs of rows that the paper tells apart, the dense row
    left out, stand in the same order here.
    """
    out = {}
    for column in columns:
        cells = [r.cells[column.key] for r in rows if r.stage != "dense"]
        both = [(c.mean, c.paper) for c in cells if c.mean is not None and c.paper is not None]
        pairs = [(a, b) for i, a in enumerate(both) for b in both[i + 1 :] if a[1] != b[1]]
        if pairs:
            out[column.title] = (sum((a[0] < b[0]) == (a[1] < b[1]) for a, b in pairs), len(pairs))
    return out
