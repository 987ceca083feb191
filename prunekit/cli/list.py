"""`prunekit list [KIND [NAME]]`: every component and every YAML of options for one, a line each, or
one with what its options mean; `--markdown` prints the documentation's table of methods.
"""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from prunekit.cli.paths import PACKAGES, conf_dirs
from prunekit.cli.suggestions import chosen_wrong, homes, yaml_names
from prunekit.errors import ConfigError
from prunekit.source import Listed, components, first_sentence

METHOD_KINDS = ("criterion", "ratio", "pruner", "recovery")


def main(argv: list[str]) -> int:
    """Prints one component, those of one kind, or all. Raises ConfigError."""
    console = Console()
    if argv == ["--markdown"]:
        console.out(methods_table(), end="", highlight=False)
        return 0
    words = [word for given in argv for word in given.split("=")]  # criterion=taylor
    kinds = [*PACKAGES, "experiment"]
    if len(words) == 2 and words[0] in kinds and words[1] not in kinds:
        print(described(*words))
        return 0
    for word in [w for w in words if w not in kinds]:
        asked = [f"`prunekit list {home.replace('=', ' ')}`" for home in homes(word)]
        hint = f"\n  hint: {' or '.join(asked)} shows its options" if asked else ""
        raise ConfigError(f"no kind {word!r}; kinds: {', '.join(kinds)}{hint}")
    for kind in words or PACKAGES:  # of experiments there are many: asked for alone
        table = Table(title=kind, title_justify="left", box=None, pad_edge=False)
        for column in ("name", "what it does", "options"):
            table.add_column(column, overflow="fold")
        for name, entry in sorted(registered(kind).items()):
            table.add_row(name, entry.summary, options(entry))
        for name, summary, said in presets(kind):
            table.add_row(name, summary, said if kind != "experiment" else "")
        console.print(table, "")
    return 0


def registered(kind: str) -> dict[str, Listed]:
    """The components of a kind; experiments are YAMLs alone."""
    return components(PACKAGES[kind]) if kind in PACKAGES else {}


def described(kind: str, name: str) -> str:
    """What a component says of itself, and the YAMLs that set its options, whose comments say what
    they mean: its own first, then those that it starts from. Raises ConfigError.
    """
    if name not in yaml_names(kind):
        raise ConfigError(chosen_wrong(kind, name))
    parts = []
    if entry := registered(kind).get(name):
        about = [f"{k}: {v}" for k, v in entry.meta.items() if v != "-" and k != "scored"]
        parts += [entry.doc.strip(), ", ".join(about)]
    for file, places in yaml_files(kind, name, kind).items():
        typed = ": " + ", ".join(f"{p}.OPTION=VALUE" for p in places) if kind in PACKAGES else ""
        where = next(file.relative_to(top.parent) for top in conf_dirs() if top in file.parents)
        parts.append(f"--- {where}{typed}\n{file.read_text(encoding='utf-8').strip()}")
    return "\n\n".join(p for p in parts if p)


def yaml_files(kind: str, name: str, place: str) -> dict[Path, list[str]]:
    """The YAML of that name and those of its `defaults`: where in a configuration each puts its
    options, such as `eval.ppl`.
    """
    file = next(f for top in conf_dirs() if (f := top / kind / f"{name}.yaml").is_file())
    found = {file: [place]}
    for base in (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("defaults", ()):
        other, _, key = str(base).removeprefix(f"/{kind}/").partition("@")
        if other in yaml_names(kind):
            below = yaml_files(kind, other, f"{place}.{key}" if key else place)
            for path, places in below.items():
                found[path] = found.get(path, []) + places
    return found


def options(entry: Listed) -> str:
    """`mode=param_first, reduce=sum`; an option without default stands alone."""
    return ", ".join(f"{k}={v.strip(chr(39))}" if v else k for k, v in entry.options.items())


def presets(kind: str) -> list[tuple[str, str, str]]:
    """(name, the first line of its comment or of an experiment's the first sentence, the options
    that it sets) of every YAML that is no component of its own, such as model=llama_7b.
    """
    found = []
    for name in yaml_names(kind):
        if name not in registered(kind):
            path = next(iter(yaml_files(kind, name, kind)))
            text = path.read_text(encoding="utf-8").removeprefix("# @package _global_\n")
            node = yaml.safe_load(text)
            values = node.items() if isinstance(node, dict) else ()
            own = [
                f"{k}={v}"
                for k, v in values
                if k not in ("name", "defaults") and not isinstance(v, dict)
            ]
            lines = takewhile(lambda line: line.startswith("#"), text.splitlines())
            said = [line.removeprefix("#").strip() for line in lines] or [""]
            comment = first_sentence(" ".join(said)) if kind == "experiment" else said[0]
            found.append((name, comment, ", ".join(own)))
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
