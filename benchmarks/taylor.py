"""What Taylor scoring costs: gradients folded as they appear, against all of them kept, and against
a bare forward and backward.

    python benchmarks/taylor.py

On smollm2_135m and a random Llama of TinyLlama's shape (1.1 B, bfloat16), 10 x 64 tokens.
Every way runs in a process of its own (peaks do not mix) and all of them in one go; the table has
seconds, the peak above the loaded model in MiB, and the two ratios that the project promises:
memory over weights (at most 0.5) and time over bare (at most 1.15).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from prunekit.activations.runs import ModelRun
from prunekit.criteria.taylor import channel_importance, taylor
from prunekit.profiling import Peak
from prunekit.registry import models
from prunekit.scoring.aggregate import scored, unit_scores

WAYS = ("bare", "kept", "folded")
NAMES = ("smollm2_135m", "llama_1b")


def load(name: str) -> torch.nn.Module:
    """The real model in float32, or random weights in TinyLlama's shape in bfloat16."""
    if name == "smollm2_135m":
        return models.build({"name": name})()[0]
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = dict(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(
            LlamaConfig(vocab_size=32000, max_position_embeddings=2048, **shape)
        ).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def keep_everything(model, groups, run) -> None:
    """The plain way: every gradient in memory at once, scores folded afterwards."""
    for out in run.losses():
        out.loss.backward()
    params = dict(model.named_parameters())
    sums = {}
    with torch.no_grad():
        for g in groups:
            for m in scored(g):
                p = params[m.param]
                sums[m.param, m.axis] = channel_importance(
                    p, p.grad, None, "param_first", [m.axis]
                )[m.axis]
    for g in groups:
        unit_scores(g, sums, "sum")


def bare(model, run) -> None:
    """A forward and a backward over the same tokens, nothing scored."""
    for out in run.losses():
        out.loss.backward()


def measure(name: str, way: str, repeats: int) -> dict[str, float]:
    """Seconds of the fastest of `repeats`, the least disturbed; the peak above the model is that of
    the first, when nothing is cached yet.
    """
    from prunekit.graph import discover

    model = load(name)
    groups = [g for g in discover(model) if g.kind in ("heads", "neurons")]
    run = ModelRun(
        model, torch.randint(3, 30000, (10, 64), generator=torch.Generator().manual_seed(0))
    )
    for p in model.parameters():  # weights are mapped from the file: read them all in first
        p.detach().float().sum()
    bare(model, ModelRun(model, run.tokens[:1, :8]))  # what libraries allocate once
    seconds = []
    for i in range(repeats):
        model.zero_grad(set_to_none=True)
        with Peak() as peak:
            start = time.perf_counter()
            if way == "bare":
                bare(model, run)
            elif way == "kept":
                keep_everything(model, groups, run)
            else:
                taylor(model, groups, run)
            seconds.append(time.perf_counter() - start)
        if i == 0:
            above = peak.mib - peak.start_mib
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    return {"seconds": min(seconds), "above_mib": above, "weights_mib": weights}


def one(name: str, way: str, repeats: int, environment: dict[str, str]) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, Path(__file__), "--repeats", str(repeats), "--one", name, way]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | environment
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    cli.add_argument("--models", nargs="*", default=NAMES, choices=NAMES)
    cli.add_argument("--repeats", type=int, default=3)
    cli.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = cli.parse_args()
    if args.one:
        print(json.dumps(measure(*args.one, args.repeats)))
        return
    print(
        "| model | way | seconds | time / bare | peak above model, MiB | / weights | / kept "
        "|\n|---|---|---|---|---|---|---|"
    )
    for name in args.models:
        rows = {}
        for way in WAYS:
            # Seconds with the allocator as it is. Peaks with a fixed limit: glibc else keeps freed
            # blocks, and a peak would count them.
            timed = one(name, way, args.repeats, {})
            sized = one(name, way, 1, {"MALLOC_MMAP_THRESHOLD_": "65536"})
            rows[way] = sized | {"seconds": timed["seconds"]}
        for way, r in rows.items():
            print(
                f"| {name} | {way} | {r['seconds']:.1f} | "
                f"{r['seconds'] / rows['bare']['seconds']:.2f} | {r['above_mib']:.0f} "
                f"| {r['above_mib'] / r['weights_mib']:.2f} | "
                f"{r['above_mib'] / rows['kept']['above_mib']:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
