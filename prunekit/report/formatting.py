"""What stands in a cell, in plain text: the same words in every form of the report."""

from __future__ import annotations

from prunekit.report.fidelity import sentences
from prunekit.report.labels import seeds
from prunekit.report.load import Found
from prunekit.report.metrics import Column
from prunekit.report.origins import origins
from prunekit.report.table import Cell, ReportTable, Row

HEADS = ("method", "ratio", "tuned")


def ours(cell: Cell, column: Column, plus_minus: str = " ± ") -> str:
    """`19.31 ± 0.20`."""
    text = column.text(cell.mean)
    if cell.mean is None or not cell.spread:
        return text
    return f"{text}{plus_minus}{column.text(cell.spread, cell.mean)}"


def theirs(cell: Cell, column: Column, comparable: bool) -> str:
    """The paper's number, and how far ours is above it where the model is the same: `19.09
    (+0.22)`; empty where the paper has none.
    """
    if cell.paper is None:
        return ""
    difference = cell.difference()
    text = column.text(cell.paper)
    return text if difference is None or not comparable else f"{text} ({difference:+.2f})"


def heads(row: Row) -> tuple[str, str, str]:
    """Label, share of the parameters removed or zero, and whether recovery came after."""
    ratio = "-" if row.ratio is None else f"{row.ratio:.1%}" + " zeros" * row.zeros
    return row.label, ratio, {"dense": "-", "pruned": "no", "recovered": "yes"}[row.stage]


def remarks(
    table: ReportTable, *, below: str = "Second line of a cell", with_sentences: bool = True
) -> list[str]:
    """What a reader must know about the numbers of one table, and what each row lost in words;
    `below` says where in a cell the paper's number stands.
    """
    lines = []
    seeds = {c.n for r in table.rows for c in r.cells.values() if c.n and r.stage != "dense"}
    if max(seeds, default=0) > 1:
        counts = "/".join(map(str, sorted(seeds)))
        lines.append(
            f"± is the standard deviation over {counts} seeds (with one seed: the metric's "
            "standard error)."
        )
        if any(again_with_a_seed(r) for r in table.rows if r.stage != "dense"):
            lines.append(
                "Jobs were run again with the same seed: where their numbers differ, each counts "
                "as a seed."
            )
    elif any(c.spread and c.n == 1 for r in table.rows for c in r.cells.values()):
        lines.append("± is the metric's standard error; one seed.")
    again = max(
        (c.n for r in table.rows for c in r.cells.values() if r.stage == "dense"), default=0
    )
    if again > 1:
        lines.append(
            f"The dense model was measured up to {again} times: its ± is the standard deviation "
            "over the numbers that differ."
        )
    if table.paper:
        how = ", with ours less theirs" if table.comparable else ""
        lines.append(f"{below}: {table.paper.title}, {table.paper.source}{how}.")
        if not table.comparable:
            lines.append(
                "The model is not the paper's: compare the order of the rows, not the numbers."
            )
        if table.orders:
            pairs = ", ".join(
                f"{title} {same} of {pairs}" for title, (same, pairs) in table.orders.items()
            )
            lines.append(f"Pairs of rows in the paper's order: {pairs}.")
    lines += origins(list(dict.fromkeys(r for row in table.rows for r in row.results)))
    return [*lines, *sentences(table)] if with_sentences else lines


def again_with_a_seed(row: Row) -> bool:
    """Whether two jobs of a row differ in nothing, their seeds included."""
    return len({seeds(r.config) for r in row.results}) < len(row.results)


def troubles(found: Found) -> list[str]:
    """One line for each job that failed, did not finish, or measured something that is not a
    number.
    """
    odd = [(r.folder, r.record.get("not_finite") or []) for r in found.results]
    lines = [f"not finite: {folder}: {', '.join(keys)}" for folder, keys in odd if keys]
    lines += [f"failed: {folder}: {why}" for folder, why in found.failed.items()]
    return lines + [
        f"unfinished: {folder}: no result and no failure (killed, or still running)"
        for folder in found.unfinished
    ]
