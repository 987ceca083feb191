"""The report as markdown, LaTeX (booktabs) and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from prunekit.report.formatting import HEADS, heads, ours, remarks, theirs, troubles
from prunekit.report.load import Found
from prunekit.report.table import ReportTable

BELOW = "After the slash"
"""Where the paper's number stands in a cell."""
LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {
    c: f"\\{c}" for c in "&%$#_{}"
}


def markdown(tables: Sequence[ReportTable], found: Found) -> str:
    """Pipe tables; the best of a block is bold, the paper's number follows ours after a slash."""
    lines: list[str] = []
    for table in tables:
        titles = [*HEADS, *[c.title for c in table.columns]]
        lines += [
            f"### {table.title}",
            "",
            "| " + " | ".join(titles) + " |",
            "|---|" + "---:|" * (len(titles) - 1),
        ]
        for row in table.rows:
            texts = []
            for column in table.columns:
                cell = row.cells[column.key]
                text, below = ours(cell, column), theirs(cell, column, table.comparable)
                texts.append(
                    (f"**{text}**" if cell.best else text) + (f" / {below}" if below else "")
                )
            lines.append(
                "| " + " | ".join(t.replace("|", "\\|") for t in (*heads(row), *texts)) + " |"
            )
        lines += ["", *remarks(table, below=BELOW), ""]
    return "\n".join([*lines, *[f"- {line}" for line in troubles(found)]]).rstrip() + "\n"


def latex(tables: Sequence[ReportTable], found: Found) -> str:
    """Tables for a paper that loads booktabs: `\\usepackage{booktabs}`."""
    lines = ["% needs \\usepackage{booktabs}"]
    for table in tables:
        lines += [r"\begin{table}", r"\centering", rf"\caption{{{tex(table.title)}}}"]
        lines += [rf"\begin{{tabular}}{{llc{'r' * len(table.columns)}}}", r"\toprule"]
        lines += [
            " & ".join(tex(t) for t in (*HEADS, *[c.title for c in table.columns])) + r" \\",
            r"\midrule",
        ]
        for i, row in enumerate(table.rows):
            if i and table.rows[i - 1].block != row.block:
                lines.append(r"\midrule")
            texts = []
            for column in table.columns:
                cell = row.cells[column.key]
                text = ours(cell, column, r" $\pm$ ")
                below = theirs(cell, column, table.comparable)
                texts.append(
                    (rf"\textbf{{{text}}}" if cell.best else text)
                    + (f" / {below}" if below else "")
                )
            lines.append(" & ".join([*map(tex, heads(row)), *texts]) + r" \\")
        lines += [
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            *[f"% {line}" for line in remarks(table, below=BELOW)],
            "",
        ]
    return "\n".join([*lines, *[f"% {line}" for line in troubles(found)]]).rstrip() + "\n"


def tex(text: str) -> str:
    """Plain text with LaTeX's special characters escaped."""
    return "".join(LATEX.get(c, c) for c in text)


def table_csv(tables: Sequence[ReportTable], found: Found) -> str:
    """One line a number: table, row, metric, mean, spread, seeds, the paper's; failed jobs as lines
    of their own.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    titles = (
        "table method removed zeros target stage metric unit_title mean spread seeds paper note"
    )
    writer.writerow(titles.split())
    for table in tables:
        for row in table.rows:
            for column in table.columns:
                cell = row.cells[column.key]
                head = [
                    table.name,
                    row.label,
                    0.0 if row.zeros else row.ratio,
                    row.ratio if row.zeros else 0.0,
                    row.target,
                    row.stage,
                    column.key,
                    column.title,
                ]
                writer.writerow([*head, cell.mean, cell.spread, cell.n, cell.paper, ""])
    for folder, why in found.failed.items():
        writer.writerow(["", str(folder), *[""] * 3, "failed", *[""] * 6, why])
    for folder in found.unfinished:
        writer.writerow(["", str(folder), *[""] * 3, "unfinished", *[""] * 7])
    return out.getvalue()
