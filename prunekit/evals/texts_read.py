"""Which texts the options of a component read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from prunekit.registry import Component


def texts_read(options: Any) -> set[str]:
    """Data sets by name, files by absolute path, of a component, its options, or whatever they
    hold (`calib=mix`, `calib=sequence`). Splits of a data set are not told apart.
    """
    return set(_texts(options))


def _texts(node: Any) -> Iterator[str]:
    if isinstance(node, Component):
        node = node.options
    elif is_dataclass(node) and not isinstance(node, type):
        node = {f.name: getattr(node, f.name) for f in fields(node)}
    if not isinstance(node, dict):
        return
    if node.get("path"):
        yield str(Path(node["path"]).expanduser().resolve())
    elif node.get("dataset"):
        yield node["dataset"]
    for value in node.values():
        yield from _texts(value)
