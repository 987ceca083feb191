"""The result file: what it holds, and how it is written so that a reader never sees half of one."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from prunekit.architecture.matrices import elements_gone
from prunekit.errors import ConfigError
from prunekit.types import Pruned

VERSION = 1
"""Raised when a key changes its meaning."""


def prefixed(when: str, numbers: dict[str, float], known: dict[str, float]) -> dict[str, float]:
    """`numbers` under `when/`. Raises ConfigError when two evals give the same key."""
    named = {f"{when}/{k}": float(v) for k, v in numbers.items()}
    twice = named.keys() & known.keys()
    if twice:
        raise ConfigError(
            f"two evals both report {', '.join(sorted(twice))}: give one of them another window, "
            "dataset or label"
        )
    return named


def to_dense(
    when: str, numbers: dict[str, float], known: dict[str, float], start: str | None
) -> dict[str, float]:
    """The numbers whose keys begin with `start`, divided by the dense model's, under
    `when/<key>_to_dense`. Standard errors have none; nor has the dense model itself, nor a
    checkpoint that is measured alone.
    """
    if when == "dense" or start is None:
        return {}
    return {
        f"{when}/{k}_to_dense": float(v) / known[f"dense/{k}"]
        for k, v in numbers.items()
        if k.startswith(start) and not k.endswith("_stderr") and f"dense/{k}" in known
    }


def widths(pruned: Pruned) -> dict[str, list[int]]:
    """group name -> [units kept, units there were]."""
    gone = elements_gone(pruned.kept)
    return {name: [m.numel() - gone[name], m.numel()] for name, m in pruned.kept.items()}


def record(
    cfg: dict[str, Any],
    found: dict[str, float],
    stages: dict[str, dict[str, float]],
    pruned: Pruned,
    checkpoint: str | None,
    provenance: dict[str, Any],
) -> dict[str, Any]:
    """The content of `result.json`; docs/results.md has its keys."""
    return {
        "version": VERSION,
        "config": cfg,
        "results": found,
        "stages": stages,
        "kept": widths(pruned),
        "importance": {name: summary(s) for name, s in pruned.scores.items()},
        "notes": {k: v for k, v in pruned.notes.items() if is_plain(v)},
        "checkpoint": checkpoint,
        "provenance": provenance,
    }


def summary(scores: Any) -> dict[str, float]:
    """Mean, smallest and largest score of a group."""
    s = scores.float()
    return {"mean": float(s.mean()), "min": float(s.min()), "max": float(s.max())}


def is_plain(value: Any) -> bool:
    """Whether JSON can hold `value`."""
    if isinstance(value, dict):
        return all(isinstance(k, str) and is_plain(v) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return all(is_plain(v) for v in value)
    return value is None or isinstance(value, (bool, int, float, str))


def write(path: Path, content: dict[str, Any]) -> None:
    """Written aside, synced, renamed: the file is whole or absent. Infinities and NaNs become null,
    their keys stand in `not_finite`.
    """
    bad = [k for k, v in content["results"].items() if not math.isfinite(v)]
    clean = content | {
        "results": {k: (None if k in bad else v) for k, v in content["results"].items()},
        "not_finite": bad,
    }
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with aside.open("w") as f:
            json.dump(clean, f, indent=1)
            f.flush()
            os.fsync(f.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
