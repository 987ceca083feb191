"""The columns of a report: which metric stands under which title, in which unit, and whether more
is better.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

TASKS = {
    "acc_boolq": "BoolQ",
    "acc_piqa": "PIQA",
    "acc_norm_hellaswag": "HellaSwag",
    "acc_winogrande": "WinoGrande",
    "acc_arc_easy": "ARC-e",
    "acc_norm_arc_challenge": "ARC-c",
    "acc_norm_openbookqa": "OBQA",
    "acc_mean": "Average",
}
"""LLM-Pruner's task columns in its order; the metric of each follows the fact sheet (acc or
acc_norm).
"""
TEXTS = {"ppl_wikitext2_128": "WikiText2", "ppl_ptb_128": "PTB"}
SIZES = {
    "params": ("#Params", 1e-9, "{:.2f}", -1),
    "macs": ("#MACs (G)", 1e-9, "{:.2f}", -1),
    "loaded_memory_mib": ("Memory (MiB)", 1.0, "{:.1f}", -1),
    "prefill_ms": ("prefill (ms)", 1.0, "{:.1f}", -1),
    "decode_ms_per_token": ("decode (ms/token)", 1.0, "{:.2f}", -1),
}
SHARES = {
    "flips_mean": ("flips", -1),
    "loop_greedy": ("loops", -1),
    "rouge_l_greedy": ("ROUGE-L to dense", 1),
}
"""Shares that a table shows as percentages, beside accuracies."""
WRITTEN = ("exact_match_", "prompt_level_strict_acc_", "pass@1_", "needle_")
"""Metrics of tasks whose answers are written, in front of the task's name."""
MEANS = ("unseen", "in", "out")
"""Perplexities over several texts, whose ratio to the dense model's is a column; of a single text
the number is enough.
"""
QUALITY = ("ppl_", "kl_", "acc_", *SHARES, *WRITTEN)
"""How the keys begin of which the best is marked, and that are plotted by cost and ratio."""
PAPER_UNITS = {"#MACs": "#MACs (G)", "Memory": "Memory (MiB)"}
"""The paper's titles that need a unit here. Its latency is that of an unpublished script: no number
of ours stands beside it.
"""


@dataclass(frozen=True)
class Column:
    """One metric as it is shown: `shown = value * scale`, written with `form`; `better` is +1 where
    more is better, -1 where less is.
    """

    key: str
    title: str
    scale: float
    form: str
    better: int

    def text(self, shown: float | None, beside: float | None = None) -> str:
        """A value that is already scaled; `-` where there is none. A spread is written as the mean
        that it stands `beside`.
        """
        if shown is None:
            return "-"
        size = abs(shown if beside is None else beside)
        if self.key.startswith("ppl_") and size >= 1e5:
            return f"{shown:.2e}"
        if self.key == "params":
            return f"{shown:.2f}B" if size >= 1 else f"{shown * 1000:.1f}M"
        return self.form.format(shown)


def column(key: str) -> Column | None:
    """The column of a metric; None for metrics that a table leaves out (standard errors,
    details).
    """
    if key.endswith("_stderr"):
        return None
    if key in SIZES:
        return Column(key, *SIZES[key])
    if key in SHARES:
        title, better = SHARES[key]
        return Column(key, title, 100.0, "{:.2f}", better)
    if key.startswith("ppl_"):
        name, how, _ = key[4:].partition("_to_dense")
        dataset, _, window = name.rpartition("_")
        if how and dataset not in MEANS:
            return None
        title = f"{dataset}@{window}" + (" / dense" if how else "")
        return Column(key, TEXTS.get(key, title), 1.0, "{:.2f}", -1)
    if key.startswith(("kl_in_", "kl_out_")):
        side, _, window = key[3:].rpartition("_")
        return Column(key, f"KL {side}@{window}", 1.0, "{:.3f}", -1)
    if key.startswith(WRITTEN):
        return Column(key, key.replace("_", " "), 100.0, "{:.2f}", 1)
    if key.startswith("acc_"):
        return Column(key, TASKS.get(key, key[4:].replace("_", " ")), 100.0, "{:.2f}", 1)
    return None


def ordered(keys: Iterable[str]) -> list[Column]:
    """Perplexities, distances from the dense model, the paper's tasks, other accuracies, the
    average, shares, then sizes and times.
    """
    found = {k: c for k in dict.fromkeys(keys) if (c := column(k))}
    known = [*TEXTS, *TASKS]

    def rank(key: str) -> tuple[int, int]:
        if key.startswith("ppl_"):
            return 0, known.index(key) if key in known else 99
        if key.startswith("kl_"):
            return 1, 0
        if key == "acc_mean":
            return 3, 0
        if key.startswith("acc_"):
            return 2, known.index(key) if key in known else 99
        if key in SIZES:
            return 5, list(SIZES).index(key)
        return 4, 0

    return [found[k] for k in sorted(found, key=rank)]
