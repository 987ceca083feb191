"""Which texts the options of a component read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from prunekit.data.datasets import default_split
from prunekit.registry import Component


def texts_read(options: Any) -> set[str]:
    """Data sets by name, files by absolute path, of a component, its options, or whatever they
    hold (`calib=mix`, `calib=sequence`). Splits of a data set are not told apart.
    """
    return set(_texts(options))


def splits_read(calib: Component) -> set[str | tuple[str, str]]:
    """(data set, split) pairs, and files by absolute path, that a calib draws from."""
    found: set[str | tuple[str, str]] = set()
    for node in _nodes(calib):
        if node.get("path"):
            found.add(str(Path(node["path"]).expanduser().resolve()))
        elif node.get("dataset"):
            split = node.get("split") or default_split(node["dataset"], "calibrate")
            found.add((node["dataset"], split))
    return found


def _texts(node: Any) -> Iterator[str]:
    for options in _nodes(node):
        if options.get("path"):
            yield str(Path(options["path"]).expanduser().resolve())
        elif options.get("dataset"):
            yield options["dataset"]


def _nodes(node: Any) -> Iterator[dict[str, Any]]:
    """The options of a component, and of all that they hold."""
    if isinstance(node, Component):
        node = node.options
    elif is_dataclass(node) and not isinstance(node, type):
        node = {f.name: getattr(node, f.name) for f in fields(node)}
    if not isinstance(node, dict):
        return
    yield node
    for value in node.values():
        yield from _nodes(value)
