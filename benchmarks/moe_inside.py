"""Neurons inside the experts of a small mixture that has learned something, and how many experts
each layer loses by search; writes docs/moe_inside.md.

python benchmarks/trained_moe.py softmax --data-root FOLDER --minutes 5     once, and sigmoid
python benchmarks/moe_inside.py --data-root FOLDER              some minutes on one core

Text, draws and tests are those of benchmarks/moe.py. Counts by search are of the softmax mixture.
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from functools import partial
from typing import Any

import torch
from kept_results import KeptResults, by_hand
from moe import DRAWS, RATIOS, ROOT, SAMPLES, SEEN, cells, loaded, log_p, measured
from trained_moe import OUT, ROUTERS, rows_of, split_text

from prunekit import graph
from prunekit.problem import CALIBRATION, Problem
from prunekit.registry import criteria, pruners, ratios
from prunekit.scoring.expert_inputs import fused_experts

RESULTS, TABLE = ROOT / "outputs" / "moe_inside.json", ROOT / "docs" / "moe_inside.md"
EXPERTS = {"name": "oneshot", "kinds": ["experts"]}
NEURONS = {"name": "oneshot", "kinds": ["neurons"]}
UNIFORM = {"name": "uniform", "of": "units"}
COUNTS: dict[str, tuple[Any, Any, Any]] = {
    "REAP, the same number of each layer": (EXPERTS, {"name": "experts"}, UNIFORM),
    "REAP, numbers by search": (EXPERTS, {"name": "experts"}, {"name": "expert_evolution"}),
}
INSIDE: dict[str, tuple[Any, Any, Any]] = {
    "one choice for all experts, Taylor": (NEURONS, {"name": "taylor"}, UNIFORM),
    "each expert its own, Taylor": ({"name": "expert_neurons", "score": "taylor"}, None, UNIFORM),
    "each expert its own, Wanda-sp": ({"name": "expert_neurons"}, None, UNIFORM),
    "same, without the router's weight": (
        {"name": "expert_neurons", "weighted": False},
        None,
        UNIFORM,
    ),
    "each expert its own, magnitude": (
        {"name": "expert_neurons", "score": "magnitude"},
        None,
        UNIFORM,
    ),
    "Taylor, refitted": (
        {"name": "expert_neurons", "score": "taylor", "refit": True},
        None,
        UNIFORM,
    ),
    "Wanda-sp, refitted": ({"name": "expert_neurons", "refit": True}, None, UNIFORM),
    "structured OBS, refitted": (
        {"name": "expert_neurons", "score": "obs", "refit": True},
        None,
        UNIFORM,
    ),
}


def row(model: Any, tokens: Any, how: tuple[Any, Any, Any], ratio: float, seed: int) -> Any:
    """The model pruned."""
    pruner, criterion, share = how
    seeds = {"seed": seed} if share["name"] == "expert_evolution" else {}
    pruned = copy.deepcopy(model)
    inside = {f.neurons.name for f in fused_experts(pruned, graph.discover(pruned))}
    problem = Problem(
        pruned,
        token_sets={CALIBRATION: tokens},
        criterion=criteria.build(criterion) if criterion else None,
        ratio=ratios.build({**share, "target": ratio, **seeds}),
        exclude=lambda groups: [g for g in groups if g.kind != "neurons" or g.name in inside],
    )
    return pruners.build(pruner)(problem).model


def page(results: Any, notes: str) -> str:
    lines = [
        "# Inside experts, and how many of each layer",
        "",
        "Made by `python benchmarks/moe_inside.py`; do not edit by hand (but for the words at the",
        "end).",
        "",
        "The mixtures of [Experts of a trained mixture](moe.md), trained anew: softmax for five",
        "minutes, sigmoid for 45 in which other jobs held most of the machine (about 1,200 steps).",
        "Numbers compare within one table only. Calibration text, draws and tests are those of",
        "that page. *refitted*: what reads the neurons (`down_proj`) is the least squares map from",
        "those that stay, on the tokens routed to the expert. Shared experts and dense blocks stay",
        "whole.",
    ]
    for router in ROUTERS:
        for what, methods in (("experts", COUNTS), ("neurons of every expert", INSIDE)):
            if router != "softmax" and methods is COUNTS:
                continue
            for ratio in RATIOS:
                lines += ["", f"## {router}, {ratio:.0%} of the {what} gone", ""]
                lines += ["| method | ppl in | ppl out | KL in | KL out |", "|---|---|---|---|---|"]
                lines.append(f"| dense {cells(results, router, 'dense', 0)}")
                lines += [f"| {m} {cells(results, router, m, ratio)}" for m in methods]
    return "\n".join(lines) + "\n" + notes


def measure(router: str, data_root: str | None, results: Any) -> None:
    """Every row of a mixture that is not there yet."""
    tokenizer, model, tests = loaded(router, data_root)
    judge = partial(
        measured, tests=tests, dense={name: log_p(model, ids) for name, ids in tests.items()}
    )
    results.keep(f"{router}|dense|0|0", judge(model))
    text = rows_of(tokenizer, split_text(SEEN, data_root, held_out=False))
    methods = {**COUNTS, **INSIDE} if router == "softmax" else INSIDE
    for draw in range(DRAWS):
        chosen = torch.randperm(len(text), generator=torch.Generator().manual_seed(draw))
        for method, how in methods.items():
            for ratio in RATIOS:
                key = f"{router}|{method}|{ratio}|{draw}"
                if key not in results:
                    results.keep(key, judge(row(model, text[chosen[:SAMPLES]], how, ratio, draw)))
                    sys.stderr.write(f"{key}: {results[key]}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root")
    data_root = parser.parse_args().data_root
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    results = KeptResults(RESULTS)
    for router in ROUTERS:
        if (OUT / router).is_dir():
            measure(router, data_root, results)
    notes = by_hand(TABLE, "## What it says")
    TABLE.write_text(page(results, notes))


if __name__ == "__main__":
    main()
