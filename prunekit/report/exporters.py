"""The report as markdown, LaTeX (booktabs) and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from prunekit.report.formatting import HEADS, heads, ours, remarks, theirs, troubles
from prunekit.report.load import Found
from prunekit.report.table import Sheet

LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {
    c: f"\\{c}" for c in "&%$#_{}"
}


def markdown(tables: Sequence[Sheet], found: Found) -> str:
    """Pipe tables; the best of a block is bold, the paper's number follows ours after a slash."""
    lines: list[str] = []
    for sheet in tables:
        titles = [*HEADS, *[c.title for c in sheet.columns]]
        lines += [
            f"### {sheet.title}",
            "",
            "| " + " | ".join(titles) + " |",
            "|---|" + "---:|" * (len(titles) - 1),
        ]
        for row in sheet.rows:
            texts = []
            for column in sheet.columns:
                cell = row.cells[column.key]
                text, below = ours(cell, column), theirs(cell, column, sheet.comparable)
                texts.append(
                    (f"**{text}**" if cell.best else text) + (f" / {below}" if below else "")
                )
            lines.append(
                "| " + " | ".join(t.replace("|", "\\|") for t in (*heads(row), *texts)) + " |"
            )
        lines += [
            "",
            *[line.replace("Second line of a cell", "After the slash") for line in remarks(sheet)],
            "",
        ]
    return "\n".join([*lines, *[f"- {line}" for line in troubles(found)]]).rstrip() + "\n"


def latex(tables: Sequence[Sheet], found: Found) -> str:
    """Tables for a paper that loads booktabs: `\\usepackage{booktabs}`."""
    lines = ["% needs \\usepackage{booktabs}"]
    for sheet in tables:
        lines += [r"\begin{table}", r"\centering", rf"\caption{{{tex(sheet.title)}}}"]
        lines += [rf"\begin{{tabular}}{{llc{'r' * len(sheet.columns)}}}", r"\toprule"]
        lines += [
            " & ".join(tex(t) for t in (*HEADS, *[c.title for c in sheet.columns])) + r" \\",
            r"\midrule",
        ]
        for i, row in enumerate(sheet.rows):
            if i and sheet.rows[i - 1].block != row.block:
                lines.append(r"\midrule")
            texts = []
            for column in sheet.columns:
                cell = row.cells[column.key]
                text = ours(cell, column, r" $\pm$ ")
                below = theirs(cell, column, sheet.comparable)
                texts.append(
                    (rf"\textbf{{{text}}}" if cell.best else text)
                    + (f" / {below}" if below else "")
                )
            lines.append(" & ".join([*map(tex, heads(row)), *texts]) + r" \\")
        lines += [
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            *[f"% {line}" for line in remarks(sheet)],
            "",
        ]
    return "\n".join([*lines, *[f"% {line}" for line in troubles(found)]]).rstrip() + "\n"


def tex(text: str) -> str:
    """Plain text with LaTeX's special characters escaped."""
    return "".join(LATEX.get(c, c) for c in text)


def table_csv(tables: Sequence[Sheet], found: Found) -> str:
    """One line a number: table, row, metric, mean, spread, seeds, the paper's; failed jobs as lines
    of their own.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        [
            "table",
            "method",
            "removed",
            "asked",
            "stage",
            "metric",
            "unit_title",
            "mean",
            "spread",
            "seeds",
            "paper",
            "note",
        ]
    )
    for sheet in tables:
        for row in sheet.rows:
            for column in sheet.columns:
                cell = row.cells[column.key]
                head = [
                    sheet.name,
                    row.label,
                    row.ratio,
                    row.asked,
                    row.stage,
                    column.key,
                    column.title,
                ]
                writer.writerow([*head, cell.mean, cell.spread, cell.n, cell.paper, ""])
    for folder, why in found.failed.items():
        writer.writerow(["", str(folder), "", "", "failed", "", "", "", "", "", "", why])
    for folder in found.unfinished:
        writer.writerow(["", str(folder), "", "", "unfinished", "", "", "", "", "", "", ""])
    return out.getvalue()
