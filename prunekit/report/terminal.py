"""The report on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prunekit.report.formatting import HEADS, heads, ours, remarks, theirs, troubles
from prunekit.report.load import Found
from prunekit.report.table import Sheet


def show(tables: Sequence[Sheet], found: Found, console: Console | None = None) -> None:
    """Every table with its remarks, then the jobs that have no result."""
    console = console or Console()
    for sheet in tables:
        console.print(grid(sheet))
        for line in remarks(sheet):
            console.print(line, style="dim", highlight=False)
        console.print()
    for line in troubles(found):
        console.print(line, style="red", highlight=False, soft_wrap=True)


def grid(sheet: Sheet) -> Table:
    """One table; the best of a block is bold, the paper's numbers stand dimmed below ours."""
    table = Table(title=escape(sheet.title), title_justify="left", pad_edge=False)
    for i, head in enumerate(HEADS):
        table.add_column(head, justify="right" if i else "left", overflow="fold")
    for column in sheet.columns:
        table.add_column(escape(column.title), justify="right")
    for i, row in enumerate(sheet.rows):
        texts = []
        for column in sheet.columns:
            cell = row.cells[column.key]
            text = ours(cell, column)
            below = theirs(cell, column, sheet.comparable)
            texts.append(
                (f"[bold]{text}[/bold]" if cell.best else text)
                + (f"\n[dim]{below}[/dim]" if below else "")
            )
        last = i + 1 == len(sheet.rows) or sheet.rows[i + 1].block != row.block
        table.add_row(*map(escape, heads(row)), *texts, end_section=last)
    return table
