"""What evals of serving engines share: times of the dense and of the pruned model, taken in turns,
as numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from prunekit.errors import ConfigError
from prunekit.export.engine_process import Engine, ask
from prunekit.types import Dense

log = logging.getLogger("prunekit")
Times = list[list[float]]
"""For each repeat the seconds of prefill, and of all further tokens."""


def measured(
    engine: Engine,
    script: str,
    model: nn.Module,
    dense: Dense,
    *,
    write: Callable[[nn.Module, Path], Path],
    request: dict[str, Any],
    key: str,
) -> dict[str, float]:
    """Numbers whose keys begin with `key`: of the dense model those of itself, of another also
    those of the dense one, measured with it in turns. Where the engine does not take the model the
    log says why, and there are none.

    Args:
        script: that times a request inside the engine's interpreter.
        write: makes what the engine reads of a model, given a path for it.
        request: what `script` reads.
    """
    with TemporaryDirectory() as folder:
        try:
            paths = [write(model, Path(folder) / "own")]
            if not dense.itself:
                paths.append(write(dense.load(), Path(folder) / "dense"))
        except ConfigError as error:
            log.warning("%s is skipped: %s", key, error)
            return {}
        size = sum(f.stat().st_size for f in _files(paths[0]))
        (answer,) = ask(engine, script, [request | {"paths": [str(path) for path in paths]}])
    if "error" in answer:
        log.warning("%s is skipped: %s", key, answer["error"])
        return {}
    batch = request.get("batch", 1)
    tokens = [batch * request["prompt"], batch * request["new_tokens"]]
    found = rates(answer["times"][0], tokens)
    found["mib"] = size / 2**20
    if len(paths) > 1:
        found |= compared(answer["times"], tokens)
    return {f"{key}_{name}": value for name, value in found.items()}


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]


def rates(times: Times, tokens: Sequence[int]) -> dict[str, float]:
    """Tokens a second of prefill and decode, medians."""
    return {
        f"{part}_tokens_per_s": median(n / t[i] for t in times)
        for i, (part, n) in enumerate(zip(("prefill", "decode"), tokens))
    }


def compared(both: Sequence[Times], tokens: Sequence[int]) -> dict[str, float]:
    """The dense model's tokens a second, and by how much the other is faster: the median over
    repeats of a ratio of two times that were taken one after the other.
    """
    own, dense = both
    found = {f"dense_{name}": value for name, value in rates(dense, tokens).items()}
    for i, part in enumerate(("prefill", "decode")):
        found[f"{part}_speedup"] = median(d[i] / o[i] for o, d in zip(own, dense))
    return found
