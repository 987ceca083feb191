"""What a pruned checkpoint costs and brings, next to the dense one, in one process: size, load
time, prefill and decode.

    python benchmarks/checkpoint.py                 # smollm2_135m
    python benchmarks/checkpoint.py tiny_llama 5    # another model, each thing timed so often (7)

About half of the layers' parameters are gone, not the same share in any two neighbouring layers.
Dense and pruned take turns, so that whatever else runs on the machine touches both; ratios are
medians of the turns' own ratios.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from prunekit import graph
from prunekit.checkpoint import load, save
from prunekit.registry import models

PROMPT, NEW = 128, 16
SHARES = {"neurons": (0.4, 0.6, 0.5), "heads": (0.34, 0.67, 0.34)}
"""Of a kind's units that go, for three layers in turn."""


def halved(model: nn.Module) -> tuple[nn.Module, dict[str, torch.Tensor], list[Any]]:
    """Random units, not the same number in any two neighbouring layers."""
    groups = graph.discover(model)
    generator, kept = torch.Generator().manual_seed(0), {}
    for group in groups:
        if group.layer is None or group.kind not in SHARES:
            continue
        share = SHARES[group.kind][group.layer % 3]
        gone = min(round(group.units * share), group.units - 1)
        if gone:
            kept[group.name] = torch.ones(group.units, dtype=torch.bool)
            kept[group.name][torch.randperm(group.units, generator=generator)[:gone]] = False
    return graph.remove(model, kept), kept, groups


def turns(ways: dict[str, Callable[[], Any]], times: int) -> dict[str, list[float]]:
    """Seconds of each way, one after another, `times` times after one round that does not count."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(times + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if i:
                found[name].append(time.perf_counter() - start)
    return found


def show(title: str, found: dict[str, list[float]], against: str) -> None:
    """Median milliseconds, and the median of the turns' ratios to one of the ways."""
    for name, seconds in found.items():
        ratio = median(s / base for s, base in zip(seconds, found[against]))
        print(
            f"{title:10s} {name:45s} {1000 * median(seconds):9.1f} ms   x {ratio:.2f} of {against}"
        )


@torch.no_grad()
def prefill(model: nn.Module, ids: torch.Tensor) -> Any:
    return model(input_ids=ids, use_cache=True, logits_to_keep=1)


@torch.no_grad()
def decode(model: nn.Module, ids: torch.Tensor) -> None:
    out = prefill(model, ids[:, :8])
    for _ in range(NEW):
        out = model(
            input_ids=out.logits[:, -1:].argmax(-1),
            past_key_values=out.past_key_values,
            use_cache=True,
        )


def without_embedding(model: nn.Module) -> int:
    """Parameters but those of the input embedding."""
    whole = sum(p.numel() for p in model.parameters())
    return whole - model.get_input_embeddings().weight.numel()


def size(folder: Path, ending: str = "") -> float:
    """MiB of the folder's files."""
    return sum(f.stat().st_size for f in folder.iterdir() if f.name.endswith(ending)) / 2**20


def main(words: list[str]) -> None:
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    name, times = words[0] if words else "smollm2_135m", int(words[1]) if len(words) > 1 else 7
    model, tokenizer = models.build({"name": name})()
    with tempfile.TemporaryDirectory() as top:
        dense, pruned = Path(top) / "dense", Path(top) / "pruned"
        inner = without_embedding(model)
        start = time.perf_counter()
        save(model, tokenizer, dense)
        took = time.perf_counter() - start
        model, kept, groups = halved(model)
        left = without_embedding(model)
        start = time.perf_counter()
        save(model, tokenizer, pruned, kept=kept, groups=groups)
        again = time.perf_counter() - start
        machine = (
            f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, load "
            f"{os.getloadavg()[0]:.1f}"
        )
        print(f"{platform.platform()}, {machine}; {name}, float32")
        print(
            f"parameters without embedding: {inner:,} -> {left:,} ({left / inner:.1%}); saving "
            f"took {took:.1f} s and {again:.1f} s"
        )
        for what, ending in (("weights", ".safetensors"), ("folder", "")):
            whole, small = size(dense, ending), size(pruned, ending)
            print(
                f"{what:10s} dense {whole:.1f} MiB, pruned {small:.1f} MiB, x {small / whole:.2f}"
            )
        print(
            "pruned:",
            ", ".join(
                f"{f} {(pruned / f).stat().st_size / 1024:.0f} KiB"
                for f in ("pruning.json", "config.json")
            ),
        )
        ways: dict[str, Callable[[], Any]] = {
            "dense": lambda: AutoModelForCausalLM.from_pretrained(dense),
            "pruned, from_pretrained(trust_remote_code)": lambda: (
                AutoModelForCausalLM.from_pretrained(pruned, trust_remote_code=True)
            ),
            "dense, prunekit.load (hashes, tokenizer)": lambda: load(dense),
            "pruned, prunekit.load (hashes, tokenizer)": lambda: load(pruned),
        }
        show("load", turns(ways, times), "dense")
        one, two = load(dense)[0], load(pruned)[0]
    ids = torch.randint(10, 100, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    for title, act in (("prefill", prefill), ("decode", decode)):
        ways = {"dense": partial(act, one, ids), "pruned": partial(act, two, ids)}
        show(title, turns(ways, times), "dense")


if __name__ == "__main__":
    main(sys.argv[1:])
