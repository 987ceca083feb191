"""A table of milliseconds: what a sub-layer takes of a request at several widths, measured inside
the model on the device where it lies, and interpolated between them (ZipLM, arXiv 2302.04089,
section 3.2).
"""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from prunekit import graph
from prunekit.activations.dense_reference import readers_by_block
from prunekit.architecture.blocks import block_names
from prunekit.architecture.hardware import processor
from prunekit.architecture.timing import prompt_ids, request, waiter
from prunekit.selection.levels import Price
from prunekit.selection.prices import Prices, shape_key
from prunekit.types import Group, Remember

WIDTHS = 6
"""At which a sub-layer is measured, besides that of a single unit; heads at every one if these are
few.
"""
Table = dict[str, dict[int, float]]
"""Kind of sub-layer (`shape_key`) -> units removed -> milliseconds of a request."""


def latency_prices(
    model: nn.Module, groups: list[Group], asked: Mapping[str, int], remember: Remember
) -> Prices:
    """In milliseconds of a request. The table is measured once for a model, a device and the
    processor that drives it.
    """
    parts = [dict(asked), [[g.name, shape_key(model, g)] for g in groups]]
    parts += [sorted({str(p.device) for p in model.parameters()}), processor()]

    def compute() -> dict[str, Tensor]:
        table = measured_table(model, groups, asked)
        rows = [(k, *item) for k, row in enumerate(table.values()) for item in row.items()]
        whole = torch.tensor([total_ms(model, asked)], dtype=torch.float64)
        return {"rows": torch.tensor(rows, dtype=torch.float64), "dense": whole}

    found = remember(__name__, "latency table", parts, compute)
    kinds = list(dict.fromkeys(shape_key(model, g) for g in groups))
    rows: dict[str, dict[int, float]] = defaultdict(dict)
    for k, removed, ms in found["rows"].tolist():
        rows[kinds[int(k)]][int(removed)] = ms
    curves = {kind: interpolated(row) for kind, row in rows.items()}
    return Prices(
        float(found["dense"][0]),
        {g.name: curves[shape_key(model, g)] for g in groups},
        lambda pruned: total_ms(pruned, asked),
    )


def interpolated(row: dict[int, float]) -> Price:
    """Milliseconds saved by any number of units from those measured; a wider sub-layer is never
    quicker.
    """
    removed = np.array(sorted(row))
    ms = np.minimum.accumulate([row[int(n)] for n in removed])
    return lambda n: float(ms[0] - np.interp(n, removed, ms))


def grid(units: int) -> list[int]:
    """Units removed where a sub-layer is measured, 0 first; one stays."""
    return sorted({round((units - 1) * k / (WIDTHS - 1)) for k in range(WIDTHS)})


def measured_table(model: nn.Module, groups: list[Group], asked: Mapping[str, int]) -> Table:
    """Every kind of sub-layer at every width of its grid; gone as a whole it takes no time. The
    blocks share the widths out among them, so that one copy of the model, or few, shows all.
    """
    alike: dict[str, list[Group]] = defaultdict(list)
    for g in groups:
        alike[shape_key(model, g)].append(g)
    rounds = max(-(-len(grid(row[0].units)) // len(row)) for row in alike.values())
    times: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for turn in tqdm(range(rounds), desc="latency table", unit="model", leave=False):
        counts = {}
        for row in alike.values():
            widths = grid(row[0].units)
            for i, g in enumerate(row):
                counts[g.name] = widths[(i + turn * len(row)) % len(widths)]
        narrow = copy.deepcopy(model)
        modules = timed_modules(narrow, groups)
        graph.remove(
            narrow,
            {g.name: torch.arange(g.units) >= counts[g.name] for g in groups if counts[g.name]},
        )
        for kind, row in alike.items():
            names = [g.name for g in row]
            found = times_of(narrow, {n: modules[n] for n in names}, asked)
            for name in names:
                times[kind][counts[name]].append(found[name])
    units = {kind: row[0].units for kind, row in alike.items()}
    return {
        kind: {n: median(ms) for n, ms in row.items()} | {units[kind]: 0.0}
        for kind, row in times.items()
    }


def timed_modules(model: nn.Module, groups: list[Group]) -> dict[str, list[str]]:
    """The modules whose time is that of a group's sub-layer: the one around its reader, or, where
    the block itself is that, those that hold its parameters.
    """
    blocks = block_names(model)
    found: dict[str, list[str]] = {}
    for block, row in zip(blocks, readers_by_block(model, blocks, groups), strict=True):
        for r in row:
            inside = r.inside.rpartition(".")[0]
            own = list(dict.fromkeys(m.param.rpartition(".")[0] for m in r.group.members))
            found[r.group.name] = [f"{block}.{inside}"] if inside else own
    return found


def times_of(
    model: nn.Module, modules: dict[str, list[str]], asked: Mapping[str, int]
) -> dict[str, float]:
    """Milliseconds that each group's modules take of a request, the median over repeats."""
    wait, ids = waiter(model), prompt_ids(model, asked["batch"], asked["prompt"])
    runs: dict[str, list[float]] = defaultdict(list)
    with torch.no_grad():
        for i in range(asked["repeats"] + 1):
            with stopwatches(model, modules, wait) as spent:
                request(model, ids, asked["new_tokens"], wait)
            for name in modules if i else ():  # the first one warms up
                runs[name].append(1000 * spent[name])
    return {name: median(seconds) for name, seconds in runs.items()}


@contextmanager
def stopwatches(
    model: nn.Module, modules: dict[str, list[str]], wait: Callable[[], None]
) -> Iterator[dict[str, float]]:
    """Seconds spent in each group's modules, added up inside the context."""
    spent, started = dict.fromkeys(modules, 0.0), dict.fromkeys(modules, 0.0)

    def start(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            wait()
            started[name] = time.perf_counter()

        return hook

    def stop(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            wait()
            spent[name] += time.perf_counter() - started[name]

        return hook

    hooks = []
    for name, paths in modules.items():
        for path in paths:
            module = model.get_submodule(path)
            hooks.append(module.register_forward_pre_hook(start(name)))
            hooks.append(module.register_forward_hook(stop(name)))
    try:
        yield spent
    finally:
        for hook in hooks:
            hook.remove()


def total_ms(model: nn.Module, asked: Mapping[str, int]) -> float:
    """Milliseconds of a whole request, the median over repeats."""
    wait, ids = waiter(model), prompt_ids(model, asked["batch"], asked["prompt"])
    with torch.no_grad():
        times = [
            sum(request(model, ids, asked["new_tokens"], wait)) for _ in range(asked["repeats"] + 1)
        ]
    return 1000 * median(times[1:])
