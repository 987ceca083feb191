"""The report as one HTML page that needs no network: sortable tables, and plots drawn by plotly.js,
which is part of the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from prunekit.report.fidelity import Panel, panels
from prunekit.report.formatting import HEADS, heads, ours, remarks, theirs, troubles
from prunekit.report.load import STAGES, Found, Result
from prunekit.report.metrics import QUALITY, Column
from prunekit.report.table import ReportTable, Row

OPEN = 6
"""So many panels, or troubles, are shown at once; more are folded away."""


def html(tables: Sequence[ReportTable], found: Found) -> str:
    """The whole page: its style, its script, its numbers, and plotly.js (4.8 MB)."""
    from plotly.offline import get_plotlyjs

    parts = files("prunekit.report")
    body = "\n".join(section(table, i) for i, table in enumerate(tables))
    return (
        (parts / "page.html")
        .read_text()
        .format(
            style=(parts / "page.css").read_text(),
            jobs=f"{len(found.results)} finished, {len(found.failed)} failed, "
            f"{len(found.unfinished)} unfinished",
            troubles=listed(troubles(found)),
            tables=body,
            plotly=get_plotlyjs(),
            data=as_script([plots(table) for table in tables]),
            script=(parts / "page.js").read_text(),
        )
    )


def listed(lines: Sequence[str]) -> str:
    """What went wrong, above the results; folded where it would hide them."""
    if not lines:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    shown = " open" if len(lines) <= OPEN else ""
    head = f"<summary>{len(lines)} jobs failed, unfinished or not finite</summary>"
    return f'<details{shown}>{head}<ul class="bad">{items}</ul></details>'


def as_script(data: Any) -> str:
    """JSON that cannot end the script element it stands in, nor begin another one."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def section(table: ReportTable, index: int) -> str:
    """One table with its remarks and empty places for its plots."""
    titles = [*HEADS, *[c.title for c in table.columns]]
    head = "".join(
        f'<th scope="col"><button type="button">{escape(t)}</button></th>' for t in titles
    )
    rows = "\n".join(table_row(table, row) for row in table.rows)
    notes = "".join(f"<p>{escape(line)}</p>" for line in remarks(table, with_sentences=False))
    return (
        f"<section><h2>{escape(table.title)}</h2>\n"
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{rows}</tbody></table></div>\n"
        f'<div class="notes">{notes}</div>{fidelity(table)}'
        f'<div class="plots" data-sheet="{index}"></div></section>'
    )


def fidelity(table: ReportTable) -> str:
    """What each row kept of the dense model; empty where none was compared with it."""
    found = panels(table)
    if not found:
        return ""
    state = " open" if len(found) <= OPEN else ""
    return (
        f"<details{state}><summary>What is kept of the dense model</summary>"
        f'<div class="panels">{"".join(map(panel, found))}</div></details>'
    )


def panel(of: Panel) -> str:
    """One row's panel: its sentence, and a bar for every number that is a share of the dense
    model's.
    """
    rows = []
    for line in of.lines:
        texts = "".join(f"<td>{escape(text)}</td>" for text in (line.dense, line.here, line.change))
        share = None if line.kept is None else max(0.0, min(1.0, line.kept))
        bar = "" if share is None else f'<span class="bar" style="width:{share:.0%}"></span>'
        rows.append(f"<tr><th scope=row>{escape(line.title)}{bar}</th>{texts}</tr>")
    return (
        f"<article><h4>{escape(of.label)}</h4><p>{escape(of.sentence)}</p>"
        '<div class="scroll"><table>'
        "<tr><td></td><td>dense</td><td>here</td><td>change</td></tr>"
        f"{''.join(rows)}</table></div></article>"
    )


def table_row(table: ReportTable, row: Row) -> str:
    """One line; `data-v` is what a column is sorted by."""
    label, ratio, tuned = heads(row)
    cells = [
        td(escape(label), label),
        td(escape(ratio), row.ratio),
        td(escape(tuned), STAGES.index(row.stage)),
    ]
    for column in table.columns:
        cell = row.cells[column.key]
        below = theirs(cell, column, table.comparable)
        text = escape(ours(cell, column)) + (f"<small>{escape(below)}</small>" if below else "")
        cells.append(td(text, cell.mean, "best" if cell.best else ""))
    return f"<tr>{''.join(cells)}</tr>"


def td(text: str, value: float | str | None, style: str = "") -> str:
    """One cell; an absent value sorts last."""
    shown = "" if value is None else escape(str(value), quote=True)
    return f'<td data-v="{shown}"{f" class={style}" if style else ""}>{text}</td>'


def plots(table: ReportTable) -> dict[str, Any]:
    """The numbers that page.js draws: a point per row, widths and importance by layer, curves of
    recovery.
    """
    pruned = [r for r in table.rows if r.stage == "pruned"]

    def widths(r: Result) -> dict[str, float]:
        return {name: kept / of for name, (kept, of) in r.record.get("kept", {}).items() if of}

    def importance(r: Result) -> dict[str, float]:
        return {name: s["mean"] for name, s in r.record.get("importance", {}).items()}

    return {
        "metrics": [metric(c) for c in table.columns],
        "points": [point(table, row) for row in table.rows],
        "widths": by_layer(pruned, widths),
        "importance": by_layer(pruned, importance),
        "curves": [c for row in table.rows if row.stage == "recovered" and (c := curve(row))],
    }


def metric(column: Column) -> dict[str, Any]:
    """One column as the plots see it."""
    quality = column.key.startswith(QUALITY)
    return {
        "key": column.key,
        "title": column.title,
        "better": column.better,
        "quality": quality,
    }


def point(table: ReportTable, row: Row) -> dict[str, Any]:
    """One row as the scatter plots see it."""
    values = {c.key: finite(row.cells[c.key].mean) for c in table.columns}
    spreads = {c.key: s for c in table.columns if (s := finite(row.cells[c.key].spread))}
    return {
        "label": row.label,
        "stage": row.stage,
        "target": row.target,
        "values": values,
        "spreads": spreads,
    }


def finite(value: float | None) -> float | None:
    """JSON has no infinities."""
    return value if value is not None and math.isfinite(value) else None


def by_layer(
    rows: Sequence[Row], values: Callable[[Result], dict[str, float]]
) -> dict[str, dict[str, Any]]:
    """kind of unit -> a value for each row and layer; members of split groups and the experts of a
    layer are averaged.
    """
    kinds: dict[str, dict[str, dict[int, list[float]]]] = {}
    for row in rows:
        for name, value in values(row.results[0]).items():
            kind, _, rest = name.partition("/")[0].partition(".")
            layer = rest.partition(".")[0]
            if layer.isdigit() and value is not None and math.isfinite(value):
                layers = kinds.setdefault(kind, {}).setdefault(titled(row), {})
                layers.setdefault(int(layer), []).append(value)
    return {kind: grid(rows_of_kind) for kind, rows_of_kind in kinds.items()}


def titled(row: Row) -> str:
    """The row's label with the ratio that was asked for."""
    return row.label + (f" {row.target:.0%}" if row.target is not None else "")


def grid(rows: dict[str, dict[int, list[float]]]) -> dict[str, Any]:
    """Row names, layers, and a matrix with null where a row says nothing of a layer."""
    depth = 1 + max(layer for values in rows.values() for layer in values)
    cells = [
        [sum(v[i]) / len(v[i]) if i in v else None for i in range(depth)] for v in rows.values()
    ]
    return {"rows": list(rows), "depth": depth, "cells": cells}


def curve(row: Row) -> dict[str, Any] | None:
    """Steps and losses of the first seed's recovery."""
    logged = row.results[0].record.get("notes", {}).get("recovery_curve") or []
    trained = [(e["step"], e["loss"]) for e in logged if finite(e.get("loss")) is not None]
    held = [(e["step"], e["eval_loss"]) for e in logged if finite(e.get("eval_loss")) is not None]
    return {"label": titled(row), "loss": trained, "eval_loss": held} if trained or held else None
