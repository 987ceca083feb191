"""The report on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prunekit.report.formatting import HEADS, heads, ours, remarks, theirs, troubles
from prunekit.report.load import Found
from prunekit.report.table import ReportTable


def show(tables: Sequence[ReportTable], found: Found, console: Console | None = None) -> None:
    """Every table with its remarks, then the jobs that have no result."""
    console = console or Console()
    for report_table in tables:
        console.print(grid(report_table))
        for line in remarks(report_table):
            console.print(line, style="dim", highlight=False)
        console.print()
    for line in troubles(found):
        console.print(line, style="red", highlight=False, soft_wrap=True)


def grid(report_table: ReportTable) -> Table:
    """One table; the best of a block is bold, the paper's numbers stand dimmed below ours."""
    table = Table(title=escape(report_table.title), title_justify="left", pad_edge=False)
    for i, head in enumerate(HEADS):
        table.add_column(head, justify="right" if i else "left", overflow="fold")
    for column in report_table.columns:
        table.add_column(escape(column.title), justify="right")
    for i, row in enumerate(report_table.rows):
        texts = []
        for column in report_table.columns:
            cell = row.cells[column.key]
            text = ours(cell, column)
            below = theirs(cell, column, report_table.comparable)
            texts.append(
                (f"[bold]{text}[/bold]" if cell.best else text)
                + (f"\n[dim]{below}[/dim]" if below else "")
            )
        last = i + 1 == len(report_table.rows) or report_table.rows[i + 1].block != row.block
        table.add_row(*map(escape, heads(row)), *texts, end_section=last)
    return table
