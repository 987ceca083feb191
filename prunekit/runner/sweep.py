"""The jobs of a sweep: which overrides each has, where it writes, and how it ended. Hydra's part is
in hydra_plugins/prunekit_sweeper.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from prunekit.errors import ConfigError

NEUTRAL = ("row", "track", "data_root", "cache", "resume", "keep_stages", "objective")
"""Keys that do not make it another sweep."""


@dataclass(frozen=True)
class Plan:
    """Jobs in order, each a list of overrides and the name of its folder; `key` names the sweep by
    what its jobs share.
    """

    jobs: list[tuple[str, list[str]]]
    key: str


def parse(words: Sequence[str]) -> list[Override]:
    """Hydra's own grammar."""
    return OverridesParser.create().parse_overrides(list(words))


def expand(
    words: Sequence[str],
    rows: dict[str, dict[str, Any] | None] | None,
    *below: dict[str, Any] | None,
) -> Plan:
    """Every combination of the values in `words`, for each row of the table.

    A row is a mapping of overrides; the mappings `below`, of which a later one wins, hold for all
    rows. What is typed wins over the row, the row over what is below it. An entry `rows` below
    replaces what single rows say, and leaves out those that it sets to null. `row=NAME,...` in
    `words` chooses rows, of all that there are. Raises ConfigError.
    """
    given = {o.get_key_element(): o for o in parse(words)}
    rescaled = stacked(*[(layer or {}).get("rows") for layer in below])
    choice = given.pop("row", None)
    names = [
        n
        for n in chosen_rows(choice, rows)
        if choice is not None or rescaled.get(n or "", {}) is not None
    ]
    lower = [{k: v for k, v in (layer or {}).items() if k != "rows"} for layer in below]
    jobs: list[tuple[str, list[str]]] = []
    constants: dict[str, str] = {}
    for name in names:
        own = stacked(
            *lower, (rows or {}).get(name or ""), rescaled.get(name or ""), dict.fromkeys(given, "")
        )
        overridden = {
            o.get_key_element(): o
            for o in parse([override(k, v) for k, v in own.items() if k not in given])
        }
        axes = {k: values(o) for k, o in (given | overridden).items()}
        swept = {k for k, v in axes.items() if len(v) > 1}
        constants |= {k: v[0] for k, v in axes.items() if k in given and k not in swept}
        row = [f"row={quoted(name)}"] if name is not None else []
        for combination in itertools.product(*axes.values()):
            label = [name] if name is not None else []
            label += [w for k, w in zip(axes, combination, strict=True) if k in swept]
            jobs.append((slug(label), [*combination, *row]))
    return Plan(unique(jobs), key_of(constants, jobs))


def planned(words: Sequence[str], cfg: DictConfig) -> Plan:
    """The jobs that `words` make of the table and at the scale of a composed configuration. Its
    interpolations, such as ${seed}, are left for each job to resolve. Raises ConfigError.
    """
    base, rows, scales = (
        OmegaConf.to_container(cfg[key]) if cfg.get(key) else None
        for key in ("base", "rows", "scales")
    )
    return expand(words, rows, base, scale_of(cfg.get("scale", "full"), scales))  # type: ignore[arg-type]


def stacked(*layers: dict[str, Any] | None) -> dict[str, Any]:
    """Mappings of overrides on top of each other. Choosing a component ends what lower ones said of
    its options: they may not exist in it.
    """
    out: dict[str, Any] = {}
    for layer in layers:
        out = {
            k: v
            for k, v in out.items()
            if k.partition(".")[0] not in (layer or {}) or k in (layer or {})
        }
        out |= layer or {}
    return out


def scale_of(name: str, scales: dict[str, Any] | None) -> dict[str, Any]:
    """The overrides of a scale; `full` has none. Raises ConfigError naming the scales there are."""
    if name != "full" and name not in (scales or {}):
        raise ConfigError(
            f"scale={name}: this experiment has {', '.join(['full', *(scales or {})])}"
        )
    return (scales or {}).get(name) or {}


def chosen_rows(choice: Override | None, rows: dict[str, Any] | None) -> list[str | None]:
    """All rows, or those that the user names. Raises ConfigError naming the rows there are."""
    if rows is None:
        if choice is not None:
            raise ConfigError(
                "row=... chooses rows of an experiment's table, and there is none: give "
                "experiment=..."
            )
        return [None]
    if choice is None:
        return list(rows)
    names = [
        str(v)
        for v in (choice.sweep_iterator() if choice.is_sweep_override() else [choice.value()])
    ]
    unknown = [n for n in names if n not in rows]
    if unknown:
        raise ConfigError(f"no row {unknown[0]!r} in this experiment; its rows: {', '.join(rows)}")
    return list(names)


def values(o: Override) -> list[str]:
    """One override as `key=value` words, one a value. Raises ConfigError for ranges that have no
    end.
    """
    key = o.get_key_element()
    if not o.is_sweep_override():
        return [key if o.is_delete() else f"{key}={o.get_value_element_as_str()}"]
    if not o.is_discrete_sweep():
        raise ConfigError(f"{o.input_line} is no list of values; give a,b,c or range(...)")
    return [f"{key}={v}" for v in o.sweep_string_iterator()]


def override(key: str, value: Any) -> str:
    """`key: value` of a YAML mapping as a word of the command line; strings pass as they are, so
    `1,2` is a sweep.
    """
    return f"{key}={value if isinstance(value, str) else literal(value)}"


def literal(value: Any) -> str:
    """A YAML value in Hydra's grammar."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(literal, value)) + "]"
    return quoted(value) if isinstance(value, str) else str(value)


def quoted(text: str) -> str:
    """A string in single quotes."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def slug(parts: Sequence[str]) -> str:
    """A folder name that says what a job is: letters, digits and a few signs, at most 100
    characters.
    """
    text = "_".join(re.sub(r"[^\w.=+-]+", "-", p).strip("-") for p in parts) or "0"
    return (
        text if len(text) <= 100 else f"{text[:90]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    )


def unique(jobs: Sequence[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
    """Folder names that came out alike get a number."""
    seen: dict[str, int] = {}
    out = []
    for name, words in jobs:
        seen[name] = seen.get(name, 0) + 1
        out.append((name if seen[name] == 1 else f"{name}_{seen[name]}", words))
    return out


def key_of(constants: dict[str, str], jobs: Sequence[tuple[str, list[str]]]) -> str:
    """Eight hex digits of what all jobs share and of the keys they differ in, so that a wider range
    of values finds the old jobs.
    """
    shared = sorted(
        v
        for k, v in constants.items()
        if k not in ("experiment", "scale") and k.lstrip("+").split(".")[0] not in NEUTRAL
    )
    differ = sorted({w.partition("=")[0] for _, words in jobs for w in words} - constants.keys())
    parts = shared if any(k == "experiment" for k in constants) else [shared, differ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8] if parts else ""


def folder_of(key: str, table: str | None, scale: str) -> str:
    """`llm_pruner/table6`, `llm_pruner/table6-small`, with the key behind it if more was said;
    `sweep-1f3a90bc` without an experiment.
    """
    if not table:
        return f"sweep-{key}"
    return "-".join(p for p in (table, scale if scale != "full" else "", key) if p)


def state(folder: Path) -> str:
    """`finished`, `failed: REASON` or `unfinished`."""
    from prunekit.report.load import reason

    if (folder / "failed.txt").exists():
        return f"failed: {reason(folder / 'failed.txt')}"
    return "finished" if (folder / "result.json").exists() else "unfinished"


def badly_ended(folders: Sequence[Path], noted: Sequence[str]) -> list[str]:
    """A line for each job that did not end well, as its folder says, or as it `noted` itself: a
    full disk takes no failure, and an older result may hide it.
    """
    found = []
    for folder in folders:
        said, start = state(folder), f"prunekit: job {folder} "
        own = [line for line in noted if line.startswith(start)]
        if own and not said.startswith("failed"):
            found.append(own[0])
        elif said != "finished":
            found.append(start + said)
    return found


def plain_config(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as a plain dict, without what only the sweep needs. An evaluation that was
    chosen alone is a suite of one, under its own name.
    """
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    evals = plain.get("eval")
    if isinstance(evals, dict) and isinstance(name := evals.get("name"), str):
        plain["eval"] = {name: evals}
    return {k: v for k, v in plain.items() if k not in ("base", "rows", "scales")}
