"""Which jobs are done: a result of the same configuration and the same code need not be made
again. Nothing here imports torch.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prunekit.errors import ConfigError
from prunekit.registry import REGISTRIES
from prunekit.runner.inputs import inputs
from prunekit.source import code_hash, components

log = logging.getLogger("prunekit")
MODES = ("strict", "config", "off")
IGNORED = {"out", "track", "resume", "cache", "keep_stages", "objective"}
"""Keys that change no number and leave nothing out of a job's folder."""
RUNNER = "prunekit.runner.run"


def code_version(cfg: dict[str, Any]) -> str:
    """SHA-256 of the source that this configuration runs: the runner, the components that it names,
    and all that they import. A file that the run does not use changes nothing.
    """
    return code_hash([RUNNER, *component_modules(cfg)])


def component_modules(cfg: dict[str, Any]) -> list[str]:
    """The modules of the components that a configuration names, those in options included."""
    found = set()
    for kind, registry in REGISTRIES.items():
        listed = components(registry.package)
        found |= {listed[n].module for n in names_in(cfg.get(kind)) if n in listed}
    return sorted(found)


def names_in(node: Any) -> Iterator[str]:
    """Every `name` in a configuration's node, at any depth."""
    if isinstance(node, dict):
        if isinstance(node.get("name"), str):
            yield node["name"]
        for value in node.values():
            yield from names_in(value)
    elif isinstance(node, list):
        for value in node:
            yield from names_in(value)


def check_mode(cfg: dict[str, Any]) -> str:
    """`resume` of a configuration. Raises ConfigError for one that there is not."""
    mode = cfg.get("resume", "strict")
    if isinstance(mode, bool):  # YAML reads a bare off as false
        mode = "strict" if mode else "off"
    if mode not in MODES:
        raise ConfigError(f"resume={mode!r}; possible: {', '.join(MODES)}")
    return str(mode)


def result_key(cfg: dict[str, Any]) -> str:
    """What of a resolved configuration decides the results, as text that compares equal when they
    do.
    """
    return json.dumps(
        {k: v for k, v in cfg.items() if k not in IGNORED}, sort_keys=True, default=str
    )


def finished(folder: Path, cfg: dict[str, Any]) -> bool:
    """Whether `folder` holds a whole result of this configuration; `resume=config` does not ask
    which code made it of which files, `off` says no. A warning tells of a result that is not this
    one's and will be replaced. Raises ConfigError for another `resume`.
    """
    done, words = looked_at(folder, cfg)
    if words:
        log.warning("%s %s", folder, words)
    return done


def looked_at(folder: Path, cfg: dict[str, Any]) -> tuple[bool, str]:
    """What `finished` says, and what is to be said of the folder, if anything is."""
    path = folder / "result.json"
    mode = check_mode(cfg)
    if mode == "off" or not os.path.lexists(path) or (folder / "failed.txt").exists():
        return False, ""
    record = whole_record(path)
    if record is None:
        return False, ""
    made_by = record["provenance"]
    same = mode == "config" or (
        made_by.get("code") == code_version(cfg) and made_by.get("files", []) == inputs(cfg)
    )
    if result_key(record["config"]) != result_key(cfg):
        return False, "holds a result of another configuration, which is replaced"
    if not same:
        return False, "holds a result of other code or files, which is replaced"
    if record.get("checkpoint") and not (folder / "checkpoint").is_dir():
        return True, "is finished, and its checkpoint is gone; resume=off makes both anew"
    return True, ""


def whole_record(path: Path) -> dict[str, Any] | None:
    """The content of a result file. What is no result is renamed to `result.json.damaged`, with a
    warning, and gives None.
    """
    try:
        if path.is_symlink() or not path.is_file():
            raise ValueError("it is no file")
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict) or not all(
            isinstance(record.get(k), dict) for k in ("config", "results", "provenance")
        ):
            raise ValueError("it lacks config, results or provenance")
    except (ValueError, RecursionError, OSError) as error:
        aside, number = path.with_name(f"{path.name}.damaged"), 0
        while os.path.lexists(aside):
            number += 1
            aside = path.with_name(f"{path.name}.damaged{number}")
        path.rename(aside)
        log.warning(
            "%s is no result (%s): it is now %s, the job is redone", path, error, aside.name
        )
        return None
    return record
