"""The local files that a configuration names: what lies in them decides results as the options do.
Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prunekit.errors import ConfigError, expanded
from prunekit.registry import REGISTRIES

State = list[str | int]
"""Path, size, time of change of a file."""


def inputs(cfg: dict[str, Any]) -> list[State]:
    """State of the files that the components of a configuration name, and of those of a model's
    folder. What is in a data folder is not looked at.
    """
    named = {place(top) for kind in REGISTRIES for top in strings(cfg.get(kind))}
    folder = place(str((cfg.get("model") or {}).get("path") or ""))
    found = [p for p in named if is_file(p)]
    if folder != Path() and folder.is_dir():
        found += [p for p in folder.iterdir() if is_file(p)]
    return sorted(map(state, set(found)))


def located(cfg: dict[str, Any]) -> dict[str, Any]:
    """`cfg`, whose model's path is absolute where it is a folder of this machine: what is saved is
    read in other folders too.
    """
    model = cfg.get("model")
    path = place(str((model or {}).get("path") or ""))
    if path == Path() or not path.is_dir():
        return cfg
    return cfg | {"model": {**model, "path": str(path.resolve())}}  # type: ignore[dict-item]


def place(text: str) -> Path:
    """Where a text lies if it is a path: one with a `~` that is nobody's home stays as it is."""
    try:
        return expanded(text)
    except ConfigError:
        return Path(text)


def is_file(path: Path) -> bool:
    """Whether there is a file; a text that can be no path (too long, a NUL) names none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def state(path: Path) -> State:
    """The state of a file now."""
    status = path.stat()
    return [str(path), status.st_size, status.st_mtime_ns]


def strings(node: Any) -> Iterator[str]:
    """Every string among the values of a configuration's node, at any depth."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict | list):
        for value in node.values() if isinstance(node, dict) else node:
            yield from strings(value)
