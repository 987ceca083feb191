"""Which jobs are done: a result of the same configuration and the same code need not
be made again.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any, Literal

Resume = Literal["strict", "config", "off"]
IGNORED = {"out", "track", "resume", "cache"}
"""Keys that change no number and leave nothing out of a job's folder."""


@cache
def code_version() -> str:
    """SHA-256 of the package's own source files: it holds for an edited checkout as well as for an
    installed wheel.
    """
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def told(cfg: dict[str, Any]) -> str:
    """What of a resolved configuration decides the results, as text that compares equal when they
    do.
    """
    return json.dumps(
        {k: v for k, v in cfg.items() if k not in IGNORED}, sort_keys=True, default=str
    )


def finished(folder: Path, cfg: dict[str, Any]) -> bool:
    """Whether `folder` holds a whole result of this configuration; `resume=config` does not ask
    which code made it, `off` says no.
    """
    path = folder / "result.json"
    mode = cfg.get("resume", "strict")
    if mode == "off" or not path.is_file() or (folder / "failed.txt").exists():
        return False
    record = json.loads(path.read_text())
    same_code = mode == "config" or record["provenance"].get("code") == code_version()
    return same_code and told(record["config"]) == told(cfg)
