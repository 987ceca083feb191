"""Peak memory and seconds of the methods that go block by block, on a random model of TinyLlama's
shape (1.1 B parameters, bfloat16).

    python benchmarks/memory_1b.py [wanda sparsegpt obs]     # 16 x 256 tokens

Each method has a process of its own. The peak is that of the process, interpreter and libraries
included; the promise is 12 GB.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import torch
from taylor import load  # the same model as in the benchmark of Taylor scoring

from prunekit.problem import CALIBRATION, Problem
from prunekit.profiling import Peak
from prunekit.registry import criteria, pruners, ratios

LIMIT = 12
HALF = {"name": "uniform", "target": 0.5, "of": "prunable"}
FIFTH = {"name": "uniform", "target": 0.2, "of": "prunable"}
WAYS: dict[str, tuple[str | None, dict[str, Any], dict[str, Any]]] = {
    "wanda": ("wanda", HALF, {"name": "unstructured"}),
    "sparsegpt": (None, HALF, {"name": "sparsegpt"}),
    "obs": (None, FIFTH, {"name": "obs"}),
}


def run(way: str) -> dict[str, float]:
    """Prune once in this process."""
    criterion, ratio, pruner = WAYS[way]
    model = load("llama_1b")
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    tokens = torch.randint(0, 32000, (16, 256), generator=torch.Generator().manual_seed(0))
    problem = Problem(
        model,
        token_sets={CALIBRATION: tokens},
        criterion=criteria.build({"name": criterion}) if criterion else None,
        ratio=ratios.build(ratio),
    )
    start = time.perf_counter()
    with Peak() as peak:
        pruners.build(pruner)(problem)
    return {"seconds": time.perf_counter() - start, "peak": peak.mib, "weights": weights / 2**20}


def main(ways: list[str]) -> None:
    """The table; exit status 1 where a process went over the promise."""
    sys.stdout.write(
        f"| method | seconds | peak of the process, GiB | weights, GiB |\n|{'---|' * 4}\n"
    )
    over = False
    for way in ways:
        out = subprocess.run(
            [sys.executable, __file__, "--run", way], stdout=subprocess.PIPE, check=True, text=True
        )
        r = json.loads(out.stdout.splitlines()[-1])
        over |= r["peak"] > LIMIT * 1024
        sys.stdout.write(
            f"| {way} | {r['seconds']:.0f} | {r['peak'] / 1024:.1f} | {r['weights'] / 1024:.1f} |\n"
        )
        sys.stdout.flush()
    sys.exit(over)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        sys.stdout.write(json.dumps(run(sys.argv[2])) + "\n")
    else:
        main(sys.argv[1:] or list(WAYS))
