"""Peak memory and seconds of the methods that go block by block, and of two that look at the whole
model, on a random model of TinyLlama's shape (1.1 B parameters, bfloat16).

    python benchmarks/memory_1b.py [wanda sparsegpt obs bonsai llm_pruner]

Each method has a process of its own. The peak is that of the process, interpreter and libraries
included; `loaded` is what it had once the model was there, and `above` what pruning took beyond
that, as a share of the weights. The promise is 12 GB. 16 x 256 tokens, Bonsai and LLM-Pruner 4 x
256, Bonsai a sample at a time. glibc gives tensors of a megabyte and more back as soon as they are
freed, so that the peak is what tensors take and not what its heap keeps.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

import psutil
import torch
from taylor import load  # the same model as in the benchmark of Taylor scoring

from prunekit.problem import CALIBRATION, Problem
from prunekit.profiling import Peak
from prunekit.registry import criteria, pruners, ratios

LIMIT = 12
HALF = {"name": "uniform", "target": 0.5, "of": "prunable"}
FIFTH = {"name": "uniform", "target": 0.2, "of": "prunable"}
TOGETHER = {"name": "uniform", "target": 0.2, "of": "prunable", "ranking": "global"}
WAYS: dict[str, tuple[str | None, dict[str, Any], dict[str, Any]]] = {
    "wanda": ("wanda", HALF, {"name": "unstructured"}),
    "sparsegpt": (None, HALF, {"name": "sparsegpt"}),
    "obs": (None, FIFTH, {"name": "obs"}),
    "bonsai": (None, TOGETHER, {"name": "bonsai", "masks": 10, "rounds": 1, "batch": 1}),
    "llm_pruner": ("taylor", FIFTH, {"name": "oneshot"}),
}
WHOLE = ("bonsai", "llm_pruner")


def run(way: str) -> dict[str, float]:
    """Prune once in this process."""
    criterion, ratio, pruner = WAYS[way]
    model = load("llama_1b")
    loaded = psutil.Process().memory_info().rss
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    samples = 4 if way in WHOLE else 16
    tokens = torch.randint(0, 32000, (samples, 256), generator=torch.Generator().manual_seed(0))
    problem = Problem(
        model,
        token_sets={CALIBRATION: tokens},
        criterion=criteria.build({"name": criterion}) if criterion else None,
        ratio=ratios.build(ratio),
    )
    start = time.perf_counter()
    with Peak() as peak:
        pruners.build(pruner)(problem)
    seconds = time.perf_counter() - start
    sizes = {"loaded": loaded / 2**20, "weights": weights / 2**20}
    return {"seconds": seconds, "peak": peak.mib, **sizes}


def main(ways: list[str]) -> None:
    """The table; exit status 1 where a process went over the promise."""
    sys.stdout.write(
        "| method | seconds | peak of the process, GiB | loaded, GiB | weights, GiB | above |\n"
        f"|{'---|' * 6}\n"
    )
    over = False
    for way in ways:
        out = subprocess.run(
            [sys.executable, __file__, "--run", way],
            env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)},
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        )
        r = json.loads(out.stdout.splitlines()[-1])
        over |= r["peak"] > LIMIT * 1024
        sizes = " | ".join(f"{r[name] / 1024:.2f}" for name in ("peak", "loaded", "weights"))
        above = (r["peak"] - r["loaded"]) / r["weights"]
        sys.stdout.write(f"| {way} | {r['seconds']:.0f} | {sizes} | {above:.0%} |\n")
        sys.stdout.flush()
    sys.exit(over)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        sys.stdout.write(json.dumps(run(sys.argv[2])) + "\n")
    else:
        main(sys.argv[1:] or list(WAYS))
