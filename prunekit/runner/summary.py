"""The table that a run ends with: dense, pruned and recovered side by side, and where everything
lies.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from prunekit.report.labels import method
from prunekit.report.metrics import QUALITY, column, ordered

ROWS = {
    "params": ("parameters", "{:,.0f}", 1),
    "params_nonzero": ("not zero", "{:,.0f}", 1),
    "macs": ("MACs (64 tokens)", "{:.2f} G", 1e9),
    "weights_mib": ("weights", "{:.1f} MiB", 1),
    "peak_memory_mib": ("peak memory", "{:.0f} MiB", 1),
    "prefill_ms": ("prefill", "{:.1f} ms", 1),
    "decode_ms_per_token": ("decode", "{:.2f} ms/token", 1),
}
"""Keys with a name and a unit of their own; what the report shows of quality follows, the rest
stays in result.json.
"""
PERCENT = 100.0
STAGES = ("dense", "pruned", "recovered")


def show(record: dict[str, Any], folder: Path, console: Console | None = None) -> None:
    """Print `record` as one table and the paths of the checkpoint, the log and the result."""
    console = console or Console()
    results = record["results"]
    stages = [s for s in STAGES if any(k.startswith(f"{s}/") for k in results)]
    # Not the table's own title, which is broken at the table's width.
    console.print(title(record["config"]), style="italic", highlight=False, soft_wrap=True)
    table = Table()
    table.add_column("")
    for stage in stages:
        table.add_column(stage, justify="right")
    keys = list(dict.fromkeys(k.split("/", 1)[1] for k in results))
    shown = [k for k in ROWS if k in keys and (k != "params_nonzero" or zeroed(results))]
    shown += [c.key for c in ordered(keys) if c.key.startswith(QUALITY)]
    for key in shown:
        table.add_row(label(key), *[cell(results, stage, key) for stage in stages])
    console.print(table if shown else "nothing was measured that this table shows")
    if record["checkpoint"]:
        console.print(f"checkpoint  {record['checkpoint']}", soft_wrap=True)
    console.print(f"log         {folder / 'run.log'}", soft_wrap=True)
    console.print(f"result      {folder / 'result.json'}", soft_wrap=True)


def title(config: dict[str, Any]) -> str:
    """What was run, in one line: the model, the pruner unless it is the usual one, the criterion,
    the share, the recovery.
    """
    ratio = config["ratio"] or {"name": "none"}
    share = (
        f"{ratio['target']:.0%} of {ratio.get('of', 'units')}"
        if "target" in ratio
        else ratio["name"]
    )
    recovery = (config["recovery"] or {}).get("name") or "none"
    parts = [config["model"].get("path") or config["model"]["name"], method(config), share]
    return ", ".join(
        [p for p in parts if p != "none"] + ([f"recovery {recovery}"] if recovery != "none" else [])
    )


def zeroed(results: dict[str, Any]) -> bool:
    """Whether the model has zeros after the dense stage that it had not; to one in a thousand."""
    share: dict[str, float] = {
        stage: results[f"{stage}/params_nonzero"] / results[f"{stage}/params"]
        for stage in STAGES
        if f"{stage}/params_nonzero" in results
    }
    return min(share.values(), default=1.0) < share.get("dense", 1.0) - 1e-3


def label(key: str) -> str:
    """`ppl_pydocs_128` -> `perplexity pydocs, window 128`; `acc_norm_hellaswag` -> `accuracy (norm)
    hellaswag`.
    """
    if key in ROWS:
        return ROWS[key][0]
    if key.startswith("ppl_"):
        name, to_dense, _ = key[4:].partition("_to_dense")
        dataset, _, window = name.rpartition("_")
        return f"perplexity {dataset}, window {window}" + ", times dense" * bool(to_dense)
    if key.startswith("acc_"):
        return key.replace("acc_norm_", "accuracy (norm) ").replace("acc_", "accuracy ")
    found = column(key)
    assert found is not None
    return found.title + " (%)" * (found.scale == PERCENT)


def cell(results: dict[str, Any], stage: str, key: str) -> str:
    """One number, with its standard error where there is one."""
    value = results.get(f"{stage}/{key}")
    if value is None:
        return "-"
    if key in ROWS:
        _, form, unit = ROWS[key]
        text = form.format(value / unit)
        dense = results.get(f"dense/{key}")
        return text if stage == "dense" or not dense else f"{text} ({value / dense:.1%})"
    found, error = column(key), results.get(f"{stage}/{key}_stderr")
    assert found is not None
    # As a share, which is how an accuracy's standard error is told elsewhere.
    shown = replace(found, scale=1.0, form="{:.3f}") if key.startswith("acc_") else found
    value *= shown.scale
    if error is None:
        return shown.text(value)
    return f"{shown.text(value)} ± {shown.text(error * shown.scale, value)}"
