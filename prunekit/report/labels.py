"""Names for jobs: what differs between their configurations, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from prunekit.report.load import Result

UNTOLD = {
    "out",
    "table",
    "row",
    "resume",
    "cache",
    "save",
    "objective",
    "track",
    "device",
    "data_root",
}
"""Where a job writes and what it belongs to: no part of what was done."""


def flat(node: Any, path: str = "") -> dict[str, str]:
    """Leaves of a configuration by dotted path, as short text."""
    if isinstance(node, dict) and node:
        out: dict[str, str] = {}
        for key, value in node.items():
            out |= flat(value, f"{path}.{key}" if path else str(key))
        return out
    return {path: node if isinstance(node, str) else json.dumps(node)}


def settings(config: dict[str, Any]) -> dict[str, str]:
    """The leaves that can tell jobs apart; seeds average out, so they do not."""
    kept = {k: v for k, v in config.items() if k not in UNTOLD}
    return {k: v for k, v in flat(kept).items() if k.rpartition(".")[2] != "seed"}


def seeds(config: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """Every seed of a configuration, by its path: what tells apart the jobs that average out."""
    return tuple((k, v) for k, v in flat(config).items() if k.rpartition(".")[2] == "seed")


def names(results: Sequence[Result]) -> list[str]:
    """A label for each: its row in the experiment, then the keys in which jobs of the same row
    differ, e.g. `taylor, ratio.target=0.3`.

    Where nothing differs, the `method`. Where the components of a kind differ, the component's name
    says so, and its own options show only if they differ too.
    """
    leaves = [settings(r.config) for r in results]
    rows = [r.config.get("row") for r in results]
    labels = []
    by_row = {}
    for row in dict.fromkeys(rows):
        own = [leaf for leaf, r in zip(leaves, rows, strict=True) if r == row]
        by_row[row] = apart(varying(own), own)
    for leaf, row in zip(leaves, rows, strict=True):
        parts = [str(row)] if row else []
        for key in by_row[row]:
            if key in leaf and key != "ratio.target":
                parts.append(leaf[key] if key.endswith(".name") else f"{key}={leaf[key]}")
        labels.append(", ".join(parts))
    return labels if any(labels) else [method(r.config) for r in results]


def method(config: dict[str, Any]) -> str:
    """The pruner, but for the usual one, and the criterion: `taylor`, `unstructured, wanda`."""
    parts = [str((config.get(kind) or {}).get("name")) for kind in ("pruner", "criterion")]
    return ", ".join(p for p in parts if p not in ("oneshot", "none", "None")) or "none"


def apart(keys: Sequence[str], leaves: Sequence[dict[str, str]]) -> list[str]:
    """`keys` without those that always say what an earlier one says, such as the layers of neurons
    that follow those of heads.
    """
    columns = {key: tuple(leaf.get(key) for leaf in leaves) for key in keys}
    return [
        key
        for i, key in enumerate(keys)
        if columns[key] not in [columns[other] for other in keys[:i]]
    ]


def varying(leaves: Sequence[dict[str, str]]) -> list[str]:
    """Keys that take several values; an option only counts among jobs that use the same
    component.
    """
    out = []
    for key in dict.fromkeys(k for leaf in leaves for k in leaf):
        top = key.partition(".")[0]
        per_component: dict[str, set[str]] = {}
        for leaf in leaves:
            if key in leaf:
                per_component.setdefault(leaf.get(f"{top}.name", ""), set()).add(leaf[key])
        if key.endswith(".name") and key.count(".") == 1:
            differs = len({leaf.get(key) for leaf in leaves}) > 1
        else:
            differs = any(len(values) > 1 for values in per_component.values())
        if differs and key != f"{top}.name":
            out.append(key)
        elif differs:
            out.insert(0, key)
    return out
