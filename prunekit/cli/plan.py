"""`prunekit plan OVERRIDE...`: what a run would leave, from shapes alone: no weights are read and
nothing but a config is downloaded.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from prunekit import graph
from prunekit.architecture.macs import macs
from prunekit.checkpoint.construction import initialise_buffers
from prunekit.cli.overrides import refuse_flags
from prunekit.cli.peaks import recovery_peak, scoring_peak, weight_bytes
from prunekit.errors import ConfigError
from prunekit.export.engines import Engine, engines, lines
from prunekit.runner import preflight
from prunekit.selection.units import expand_to_all_blocks
from prunekit.types import Counts, Group, Kept

MIB = 2**20


@dataclass(frozen=True)
class Figures:
    """One model in numbers. Memory in bytes; `kv` bytes of cache for one more token of one
    sequence.
    """

    params: int
    macs: int
    weights: int
    paper_memory: int
    kv: int


@dataclass(frozen=True)
class Forecast:
    """What `plan` found: before, after, units kept by group, and estimated peaks in bytes (None
    where the run has no such stage).
    """

    dense: Figures
    pruned: Figures
    widths: list[tuple[Group, tuple[int, int]]]
    scoring: int | None
    recovery: int | None
    remarks: list[str]
    served: list[Engine]


def main(argv: list[str]) -> int:
    """Prints the forecast for the run that the same overrides would start."""
    from prunekit.cli.compose import composed

    refuse_flags(argv, "overrides such as ratio.target=0.3, and -m", ("-m", "--multirun"))
    for cfg in composed(argv):
        show(forecast(cfg), title(cfg))
    return 0


def title(cfg: dict[str, Any]) -> str:
    """Model, ratio and row, in one line."""
    from prunekit.runner.summary import title as run_title

    return (f"{cfg['row']}: " if cfg.get("row") else "") + run_title(cfg)


def forecast(cfg: dict[str, Any]) -> Forecast:
    """The same discovery and the same counts as the run, on the meta device. Raises ConfigError
    where only weights or data can tell.
    """
    parts = preflight.check(cfg)
    model, _ = parts.model(meta=True)
    dense = figures(model)
    expected = parts.expected
    if expected is None or expected.counts is None:
        why = expected.remark if expected else f"pruner={parts.pruner.name} does not say."
        raise ConfigError(f"plan: shapes alone do not tell what goes. {why}")
    scoring = scoring_peak(model, parts, cfg)
    served = copy.deepcopy(model)
    initialise_buffers(served, "cpu")
    counts = expected.counts
    whole = {g.name: g for g in graph.discover(model, verify=False)}
    if expected.smaller:
        kept = first_units(expected.groups, counts, list(whole.values()))
        graph.remove(model, kept)
        graph.remove(served, kept)
    every = [whole.get(g.name, g) for g in expected.groups]
    widths = [(g, (g.units - counts.get(g.name, 0), g.units)) for g in every]
    recovery = recovery_peak(model, cfg) if parts.recovery else None
    remarks = [expected.remark] if expected.remark else []
    left = figures(model)
    return Forecast(
        dense, left, widths, scoring, recovery, remarks, engines(served, parts.tokenizer)
    )


def first_units(groups: Sequence[Group], counts: Counts, whole: list[Group]) -> Kept:
    """Which units go makes no difference to the sizes: the first ones of those that may."""
    cut = [g for g in groups if counts.get(g.name)]
    kept = {g.name: torch.arange(g.units) >= counts[g.name] for g in cut}
    return expand_to_all_blocks(kept, cut, whole)


def figures(model: nn.Module) -> Figures:
    """Sizes of a model on the meta device."""
    weights = weight_bytes(model)
    params = sum(p.numel() for p in model.parameters())
    return Figures(params, macs(model), weights, 2 * params + rotary_tables(model), kv_bytes(model))


def rotary_tables(model: nn.Module) -> int:
    """Bytes of the cosines and sines that LLM-Pruner's transformers kept in every layer: 32 MiB for
    LLaMA-7B, part of its Memory column.
    """
    config = model.config.get_text_config() if hasattr(model, "config") else None  # type: ignore[operator,union-attr]
    positions, depth = (
        getattr(config, n, 0) or 0 for n in ("max_position_embeddings", "num_hidden_layers")
    )
    if not any("rotary" in type(m).__name__.lower() for m in model.modules()):
        return 0
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads  # type: ignore[union-attr]
    return int(depth * 2 * positions * dim * 2)


@torch.no_grad()
def kv_bytes(model: nn.Module) -> int:
    """Bytes by which the cache grows with a token: the model itself says so, asked with one token
    on the meta device.
    """
    cache = model(
        input_ids=torch.ones(1, 1, dtype=torch.long, device="meta"), use_cache=True
    ).past_key_values
    kept = [
        t
        for layer in getattr(cache, "layers", ())
        for t in (getattr(layer, "keys", None), getattr(layer, "values", None))
    ]
    return sum(t.numel() * t.element_size() for t in kept if t is not None)


def show(found: Forecast, heading: str, console: Console | None = None) -> None:
    """The forecast as a table, the widths below it."""
    console = console or Console()
    console.print(heading, style="italic", highlight=False, soft_wrap=True)
    table = Table()
    for i, name in enumerate(("", "dense", "pruned", "left")):
        table.add_column(name, justify="right" if i else "left")
    rows: list[tuple[str, str, float]] = [
        ("parameters", "params", 1),
        ("MACs, 64 tokens (G)", "macs", 1e9),
        ("weights (MiB)", "weights", MIB),
        ("in float16 as the paper counts (MiB)", "paper_memory", MIB),
        ("KV cache a token (KiB)", "kv", 1024),
    ]
    for label, key, unit in rows:
        before, after = getattr(found.dense, key), getattr(found.pruned, key)
        form = "{:,.0f}" if unit == 1 else "{:,.2f}"
        table.add_row(
            label,
            form.format(before / unit),
            form.format(after / unit),
            f"{after / before:.1%}" if before else "-",
        )
    if found.scoring is not None:
        table.add_row("estimated peak of scoring (MiB)", f"{found.scoring / MIB:,.0f}", "-", "")
    if found.recovery is not None:
        table.add_row("estimated peak of recovery (MiB)", "-", f"{found.recovery / MIB:,.0f}", "")
    console.print(table)
    for line in [*stretches(found.widths), *found.remarks]:
        console.print(line, highlight=False)
    for name, takes, how, override in lines(found.served):
        instead = f" ({override})" if override else ""
        console.print(f"{name}  {takes}: {how}{instead}", highlight=False, markup=False)


def stretches(widths: list[tuple[Group, tuple[int, int]]]) -> list[str]:
    """Kept of all units by kind, one entry for every stretch of layers that are alike: `neurons
    4-29: 8256/11008`.
    """
    by_kind: dict[str, list[tuple[int | None, tuple[int, int]]]] = {}
    for group, width in widths:
        by_kind.setdefault(group.kind, []).append((group.layer, width))
    told = []
    for kind, found in by_kind.items():
        entries: list[str] = []
        for (width, _), run in groupby(found, key=lambda x: (x[1], x[0] is None)):
            layers = [layer for layer, _ in run]
            first, last = layers[0], layers[-1]
            where = "" if first is None else f"{first}: " if first == last else f"{first}-{last}: "
            entries.append(f"{where}{width[0]}/{width[1]}")
        told.append(f"{kind}  {', '.join(entries)}")
    return told
