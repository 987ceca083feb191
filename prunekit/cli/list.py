"""`prunekit list [KIND]`: every component and every YAML of options for one, a line each;
`--markdown` prints the documentation's table of methods.
"""

from __future__ import annotations

import yaml
from rich.console import Console
from rich.table import Table

from prunekit.cli.paths import PACKAGES, conf_dirs
from prunekit.errors import ConfigError
from prunekit.source import Listed, components

METHOD_KINDS = ("criterion", "ratio", "pruner", "recovery")


def main(argv: list[str]) -> int:
    """Prints the components of one kind, or of all."""
    console = Console()
    if argv == ["--markdown"]:
        console.out(methods_table(), end="", highlight=False)
        return 0
    unknown = [k for k in argv if k not in PACKAGES]
    if unknown:
        raise ConfigError(f"no kind {unknown[0]!r}; kinds: {', '.join(PACKAGES)}")
    for kind in argv or PACKAGES:
        table = Table(title=kind, title_justify="left", box=None, pad_edge=False)
        for column in ("name", "what it does", "options"):
            table.add_column(column, overflow="fold")
        for name, entry in sorted(components(PACKAGES[kind]).items()):
            table.add_row(name, entry.summary, options(entry))
        for name, summary, said in presets(kind):
            table.add_row(name, summary, said)
        console.print(table, "")
    return 0


def options(entry: Listed) -> str:
    """`mode=param_first, reduce=sum`; an option without default stands alone."""
    return ", ".join(f"{k}={v.strip(chr(39))}" if v else k for k, v in entry.options.items())


def presets(kind: str) -> list[tuple[str, str, str]]:
    """(name, its first comment, the options that it sets) of every YAML that is no component of its
    own, such as model=llama_7b.
    """
    found = []
    for path in sorted(p for top in conf_dirs() for p in (top / kind).glob("*.yaml")):
        if path.stem not in components(PACKAGES[kind]):
            text = path.read_text(encoding="utf-8")
            node = yaml.safe_load(text)
            own = (
                {k: v for k, v in node.items() if k != "defaults" and not isinstance(v, dict)}
                if isinstance(node, dict)
                else {}
            )
            comment = (
                text.partition("\n")[0].removeprefix("#").strip() if text.startswith("#") else ""
            )
            found.append((path.stem, comment, ", ".join(f"{k}={v}" for k, v in own.items())))
    return found


def methods_table() -> str:
    """The methods as a markdown table: what each is, where it is from, what it needs and what comes
    out.
    """
    lines = ["| method | what it does | paper | needs | comes out |", "|---|---|---|---|---|"]
    for kind in METHOD_KINDS:
        for name, entry in sorted(components(PACKAGES[kind]).items()):
            if name != "none":
                source = (
                    f"{entry.meta.get('paper', '-')}, {entry.meta['year']}"
                    if entry.meta.get("paper", "-") != "-"
                    else "-"
                )
                summary = entry.summary.replace("|", "\\|")
                lines.append(
                    f"| `{kind}={name}` | {summary} | {source} | {entry.meta.get('needs', '-')} | "
                    f"{entry.meta.get('out', '-')} |"
                )
    return "\n".join(lines) + "\n"
