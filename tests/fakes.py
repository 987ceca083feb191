"""Result files as a run writes them, and the dense model as an eval sees it, without a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn


def config(**changes: Any) -> dict[str, Any]:
    """A resolved configuration; `changes` are dotted keys with two underscores for a dot."""
    cfg: dict[str, Any] = {
        "model": {"name": "tiny_llama"},
        "calib": {"name": "crop", "samples": 10, "seed": 0},
        "criterion": {"name": "taylor", "mode": "param_first"},
        "ratio": {"name": "uniform", "target": 0.2},
        "exclude": {"name": "ends"},
        "pruner": {"name": "oneshot"},
        "recovery": {"name": "none"},
        "eval": {},
        "track": {"mode": "silent"},
        "seed": 0,
        "save": False,
        "table": None,
        "row": None,
    }
    for key, value in changes.items():
        node = cfg
        *path, last = key.split("__")
        for step in path:
            node = node[step]
        node[last] = value
    return cfg


def result(
    folder: Path, numbers: dict[str, Any], cfg: dict[str, Any], layers: int = 4, **more: Any
) -> Path:
    """`folder/result.json`, with widths and importances of `layers` blocks."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "version": 1,
        "config": cfg,
        "results": numbers,
        "stages": {"prune": {"seconds": 1.0, "peak_memory_mib": 100.0}},
        "kept": {f"neurons.{i}": [90 - i, 100] for i in range(layers)}
        | {f"heads.{i}": [3, 4] for i in range(layers)},
        "importance": {
            f"neurons.{i}": {"mean": 1.0 + i, "min": 0.0, "max": 9.0} for i in range(layers)
        },
        "notes": {},
        "checkpoint": None,
        "provenance": {"seed": cfg["seed"], "code": "0"},
    } | more
    (folder / "result.json").write_text(json.dumps(record))
    return folder


def stages(
    dense: float, pruned: float, recovered: float | None = None, params: float = 6.7e9
) -> dict[str, float]:
    """Perplexity and accuracy at every stage."""
    out = {}
    for stage, ppl in (("dense", dense), ("pruned", pruned), ("recovered", recovered)):
        if ppl is not None:
            out |= {
                f"{stage}/ppl_wikitext2_128": ppl,
                f"{stage}/ppl_wikitext2_128_stderr": ppl / 50,
                f"{stage}/acc_mean": 1 / ppl,
                f"{stage}/params": params if stage == "dense" else params * 0.8,
                f"{stage}/prefill_ms": 100.0 if stage == "dense" else 80.0,
            }
    return out


@dataclass
class DenseOnce:
    """`types.Dense` without a run: what is asked of `model` is kept."""

    model: nn.Module
    itself: bool = False
    kept: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def remember(self, name: str, compute: Callable[..., dict[str, Tensor]]) -> dict[str, Tensor]:
        if name not in self.kept:
            self.kept[name] = compute(self.model)
        return self.kept[name]
