"""`prunekit list [KIND]`: every registered component with one line and its options."""

from __future__ import annotations

import inspect

from rich.console import Console
from rich.table import Table

from prunekit.registry import REGISTRIES, ConfigError, Entry


def main(argv: list[str]) -> int:
    """Prints the components of one kind, or of all."""
    unknown = [k for k in argv if k not in REGISTRIES]
    if unknown:
        raise ConfigError(f"no kind {unknown[0]!r}; kinds: {', '.join(REGISTRIES)}")
    console = Console()
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
