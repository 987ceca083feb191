"""`prunekit list [KIND]`: every registered component with one line and its options; `--markdown` prints the README's table of methods."""

from __future__ import annotations

import inspect

from rich.console import Console
from rich.table import Table

from prunekit.registry import REGISTRIES, ConfigError, Entry

METHOD_KINDS = ("criterion", "ratio", "pruner", "recovery")


def main(argv: list[str]) -> int:
    """Prints the components of one kind, or of all."""
    console = Console()
    if argv == ["--markdown"]:
        console.out(methods_table(), end="", highlight=False)
        return 0
    unknown = [k for k in argv if k not in REGISTRIES]
    if unknown:
        raise ConfigError(f"no kind {unknown[0]!r}; kinds: {', '.join(REGISTRIES)}")
    for kind in argv or REGISTRIES:
        table = Table(title=kind, title_justify="left", box=None, pad_edge=False)
        for column in ("name", "what it does", "options"):
            table.add_column(column, overflow="fold")
        for name in REGISTRIES[kind].names():
            entry = REGISTRIES[kind].entry(name)
            table.add_row(name, entry.summary, options(entry))
        console.print(table, "")
    return 0


def options(entry: Entry) -> str:
    """`mode=param_first, reduce=sum`; an option without default stands alone."""
    return ", ".join(k if v is inspect.Parameter.empty else f"{k}={v}" for k, v in entry.defaults.items() if k != "meta")


def methods_table() -> str:
    """The methods as a markdown table: what each is, where it is from, what it needs and what comes out."""
    lines = ["| method | what it does | paper | needs | comes out |", "|---|---|---|---|---|"]
    for kind in METHOD_KINDS:
        for name in REGISTRIES[kind].names():
            entry = REGISTRIES[kind].entry(name)
            if name != "none":
                source = f"{entry.meta.get('paper', '-')}, {entry.meta['year']}" if entry.meta.get("paper", "-") != "-" else "-"
                summary = entry.summary.replace("|", "\\|")
                lines.append(f"| `{kind}={name}` | {summary} | {source} | {entry.meta.get('needs', '-')} | {entry.meta.get('out', '-')} |")
    return "\n".join(lines) + "\n"
