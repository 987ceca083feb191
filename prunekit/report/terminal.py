"""The report on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prunekit.report.formatting import HEADS, heads, ours, remarks, theirs, troubles
from prunekit.report.load import Found
from prunekit.report.metrics import Column
from prunekit.report.table import Cell, ReportTable

WIDEST = 10_000
"""Columns of text that no table needs."""
AROUND = 3
"""Characters beside a cell's: a line and two spaces."""


def show(tables: Sequence[ReportTable], found: Found, console: Console | None = None) -> None:
    """Every table with its remarks, then the jobs that have no result. Where a terminal is too
    narrow for all columns they come in turns; into a file or a pipe they go side by side.
    """
    console = console or Console()
    for report_table in tables:
        room = console.width if console.is_terminal else WIDEST
        for columns in in_turns(report_table, room):
            table = grid(report_table, columns)
            if not console.is_terminal:
                wide = console.options.update(max_width=WIDEST)
                console.width = max(console.width, console.measure(table, options=wide).maximum)
            console.print(table)
        for line in remarks(report_table):
            console.print(line, style="dim", highlight=False)
        console.print()
    for line in troubles(found):
        console.print(line, style="red", highlight=False, soft_wrap=True)


def in_turns(report_table: ReportTable, room: int) -> list[list[Column]]:
    """The columns in as many tables as it takes for each to show its longest words, the method
    beside them, in `room` characters; a table has one column at least.
    """
    rows = report_table.rows
    around = list(zip(HEADS, *map(heads, rows), strict=True))
    fixed = sum(longest_word(texts) + AROUND for texts in around)
    tables: list[list[Column]] = [[]]
    left = room - fixed
    for column in report_table.columns:
        need = longest_word(column_texts(report_table, column)) + AROUND
        if tables[-1] and need > left:
            tables.append([])
            left = room - fixed
        tables[-1].append(column)
        left -= need
    return tables


def longest_word(texts: Iterable[str]) -> int:
    """Its characters: what a column cannot do without."""
    return max((len(word) for text in texts for word in text.split()), default=0)


def column_texts(report_table: ReportTable, column: Column) -> list[str]:
    """What stands in a column, its title first."""
    cells = [row.cells[column.key] for row in report_table.rows]
    return [column.title, *(text for cell in cells for text in pair(cell, column, report_table))]


def pair(cell: Cell, column: Column, report_table: ReportTable) -> tuple[str, str]:
    """Our number and the paper's."""
    return ours(cell, column), theirs(cell, column, report_table.comparable)


def grid(report_table: ReportTable, columns: Sequence[Column]) -> Table:
    """One table; the best of a block is bold, the paper's numbers stand dimmed below ours."""
    table = Table(title=escape(report_table.title), title_justify="left", pad_edge=False)
    for i, head in enumerate(HEADS):
        table.add_column(head, justify="right" if i else "left", overflow="fold")
    for column in columns:  # rich narrows the widest columns first, in the middle of words too
        texts = column_texts(report_table, column)
        whole = longest_word(texts) == max(map(len, texts))
        table.add_column(escape(column.title), justify="right", overflow="fold", no_wrap=whole)
    for i, row in enumerate(report_table.rows):
        numbers = []
        for column in columns:
            cell = row.cells[column.key]
            text, below = pair(cell, column, report_table)
            numbers.append(
                (f"[bold]{text}[/bold]" if cell.best else text)
                + (f"\n[dim]{below}[/dim]" if below else "")
            )
        last = i + 1 == len(report_table.rows) or report_table.rows[i + 1].block != row.block
        table.add_row(*map(escape, heads(row)), *numbers, end_section=last)
    return table
