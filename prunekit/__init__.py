"""prunekit: pruning of large language models, every method in one place.

The names in `__all__` are the public interface. They are imported when they are first used, so that
`import prunekit` and the command line's help wait for no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunekit.checkpoint import load, save
    from prunekit.checkpoint.replay import replay
    from prunekit.checkpoint.semi_structured import semi_structured
    from prunekit.graph import discover, remove, zero
    from prunekit.runner.run import run

__version__ = "0.1.0"
__all__ = ["discover", "load", "remove", "replay", "run", "save", "semi_structured", "zero"]

_HOMES = {
    "discover": "prunekit.graph",
    "load": "prunekit.checkpoint",
    "remove": "prunekit.graph",
    "replay": "prunekit.checkpoint.replay",
    "run": "prunekit.runner.run",
    "save": "prunekit.checkpoint",
    "semi_structured": "prunekit.checkpoint.semi_structured",
    "zero": "prunekit.graph",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'prunekit' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
