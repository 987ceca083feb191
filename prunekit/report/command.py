"""`prunekit report DIR...`: results on disk -> tables, plots, and the paper's numbers beside them.
It reads result files only.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from prunekit.errors import ConfigError
from prunekit.report import exporters, page, terminal
from prunekit.report.load import Found, load
from prunekit.report.table import ReportTable, report_tables

FORMS: dict[str, Callable[[Sequence[ReportTable], Found], str]] = {
    ".md": exporters.markdown,
    ".tex": exporters.latex,
    ".csv": exporters.table_csv,
    ".html": page.html,
}
"""suffix -> how a report of that kind is written."""


def main(argv: list[str]) -> int:
    """Prints the tables, and writes each `--to FILE` by its suffix (a folder gets all four). Status
    1 if jobs failed or did not finish.
    """
    parser = argparse.ArgumentParser(prog="prunekit report", description=__doc__)
    parser.add_argument(
        "folders", nargs="+", metavar="DIR", help="folders with results, searched to the bottom"
    )
    parser.add_argument(
        "--to",
        action="append",
        default=[],
        metavar="PATH",
        help="a .md, .tex, .csv or .html file, or a folder for all",
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing, only write the files")
    args = parser.parse_args(argv)
    targets = [file for to in args.to for file in outputs(Path(to))]
    found = load(args.folders)
    if not found.results and not found.failed:
        raise ConfigError(f"report: no results under {', '.join(args.folders)}")
    tables = report_tables(found)
    if not args.quiet:
        terminal.show(tables, found)
    for path in targets:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(FORMS[path.suffix](tables, found), encoding="utf-8")
    return int(bool(found.failed or found.unfinished))


def outputs(path: Path) -> list[Path]:
    """The files that `--to path` asks for. Raises ConfigError for a suffix that no form has."""
    if path.is_dir() or not path.suffix:
        return [path / f"report{suffix}" for suffix in FORMS]
    if path.suffix not in FORMS:
        raise ConfigError(
            f"report: cannot write {path.suffix} files; possible: {', '.join(FORMS)}, or a folder"
        )
    return [path]
