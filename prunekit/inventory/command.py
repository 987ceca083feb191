"""`prunekit groups OVERRIDE...`: which structures of a model go together, from its config alone: as
a tree, as JSON, as a picture of one block.
"""

from __future__ import annotations

import argparse
import json
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from prunekit.errors import ConfigError
from prunekit.inventory import picture, tree
from prunekit.inventory.facts import Inventory, as_json, inventory
from prunekit.runner import preflight

FORMS = (".json", ".svg", ".txt")


def main(argv: list[str]) -> int:
    """Prints the groups of the model that the same overrides would prune, and writes each `--to
    FILE` by its suffix.
    """
    args = parser().parse_intermixed_args(argv)
    targets = [target(Path(to)) for to in args.to]
    found = inventory_of_overrides(args.overrides)
    pictures = [p for p in targets if p.suffix == ".svg"]
    drawn = picture.svg(found, args.block) if pictures or args.block is not None else ""
    form = {
        ".json": lambda: data(found),
        ".svg": lambda: drawn,
        ".txt": lambda: text(found, args.all),
    }
    for path in targets:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(form[path.suffix]())
    console = Console()
    if args.json:
        console.out(data(found), end="", highlight=False)
    elif console.is_terminal:
        console.print(tree.tree(found, args.all), highlight=False)
    else:
        console.out(text(found, args.all), end="", highlight=False)
    return 0


def parser() -> argparse.ArgumentParser:
    """The command's words."""
    words = argparse.ArgumentParser(prog="prunekit groups", description=__doc__)
    words.add_argument(
        "overrides",
        nargs="*",
        metavar="OVERRIDE",
        help="as for a run: model=..., exclude=..., pruner.kinds=...",
    )
    words.add_argument(
        "--json",
        action="store_true",
        help="print JSON: every group, member and index rule, nothing folded",
    )
    words.add_argument(
        "--all", action="store_true", help="a tree with every block and every tensor, alike or not"
    )
    words.add_argument(
        "--to",
        action="append",
        default=[],
        metavar="FILE",
        help="write .json, .txt (the tree) or .svg (a picture of one block)",
    )
    words.add_argument(
        "--block",
        type=int,
        metavar="N",
        help="the block of the picture (default: the first of the most common make)",
    )
    return words


def target(path: Path) -> Path:
    """Raises ConfigError for a suffix that no form has."""
    if path.suffix not in FORMS:
        raise ConfigError(
            f"groups: cannot write {path.name!r}; possible suffixes: {', '.join(FORMS)}"
        )
    return path


def data(found: Inventory) -> str:
    """JSON with one group a line."""
    lines = {
        key: "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        if isinstance(value, list) and value
        else json.dumps(value)
        for key, value in as_json(found).items()
    }
    return "{\n" + ",\n".join(f' "{key}": {value}' for key, value in lines.items()) + "\n}\n"


def described(model: nn.Module, title: str = "") -> str:
    """The tree of any model, for a notebook."""
    return text(inventory(model, title), False)


def drawn(model: nn.Module, title: str = "", block: int | None = None) -> str:
    """The picture of one block of any model, as SVG."""
    return picture.svg(inventory(model, title), block)


def text(found: Inventory, whole: bool) -> str:
    """The tree without colours, as wide as it needs to be."""
    console = Console(width=1000, record=True, file=StringIO())
    console.print(tree.tree(found, whole), highlight=False)
    return "\n".join(line.rstrip() for line in console.export_text().splitlines()) + "\n"


def inventory_of_overrides(overrides: list[str]) -> Inventory:
    """The inventory of the model that the overrides choose, on the meta device. Raises ConfigError
    where they are not those of one run.
    """
    from prunekit.cli.compose import composed

    unknown = [w for w in overrides if "=" not in w and not w.startswith("~")]
    if unknown:
        raise ConfigError(
            f"groups: {unknown[0]!r} is not an override such as model=tiny_llama or exclude=none"
        )
    jobs = list(composed(overrides))
    if len(jobs) != 1:
        raise ConfigError(
            f"groups: looks at one model, and these overrides make {len(jobs)} jobs; give one "
            "value each (row=NAME for a table)"
        )
    return of_run(jobs[0])


def of_run(cfg: dict[str, Any]) -> Inventory:
    """The inventory with what the run's exclusion and pruner would leave alone."""
    parts = preflight.build_components(cfg)
    pruner = parts.pruner.name
    model, _ = parts.model(meta=True)
    title = str(cfg["model"].get("path") or cfg["model"]["name"])
    kinds = preflight.pruned_kinds(parts.pruner)
    asks = (
        f"pruner.kinds=[{','.join(kinds)}]"
        if "kinds" in parts.pruner.options
        else f"pruner={pruner}"
    )
    return inventory(
        model,
        title,
        exclude=parts.exclude,
        excluded_by=f"exclude={cfg['exclude']['name']}",
        kinds=kinds,
        kinds_by=asks,
    )
