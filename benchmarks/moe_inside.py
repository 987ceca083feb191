"""Neurons inside the experts of a small mixture that has learned something, and how many experts
each layer loses by search; writes docs/moe_inside.md.

python benchmarks/trained_moe.py softmax --data-root FOLDER --minutes 5     once
python benchmarks/moe_inside.py --data-root FOLDER              some minutes on one core

Text, draws and tests are those of benchmarks/moe.py.
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from functools import partial
from typing import Any

import torch
from kept_results import KeptResults
from moe import DRAWS, RATIOS, ROOT, SAMPLES, SEEN, cells, loaded, log_p, measured
from trained_moe import rows_of, split_text

from prunekit.problem import CALIBRATION, Problem
from prunekit.registry import criteria, pruners, ratios

ROUTER = "softmax"
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
}


def row(model: Any, tokens: Any, how: tuple[Any, Any, Any], ratio: float, seed: int) -> Any:
    """The model pruned."""
    pruner, criterion, share = how
    seeds = {"seed": seed} if share["name"] == "expert_evolution" else {}
    problem = Problem(
        copy.deepcopy(model),
        token_sets={CALIBRATION: tokens},
        criterion=criteria.build(criterion) if criterion else None,
        ratio=ratios.build({**share, "target": ratio, **seeds}),
    )
    return pruners.build(pruner)(problem).model


def page(results: Any) -> str:
    lines = [
        "# Inside experts, and how many of each layer",
        "",
        "Made by `python benchmarks/moe_inside.py`; do not edit by hand.",
        "",
        "The softmax mixture of [Experts of a trained mixture](moe.md), trained anew for five",
        "minutes on a machine that other jobs shared, so numbers compare within this page only.",
        "Calibration text, draws and tests are those of that page.",
    ]
    for what, methods in (("experts", COUNTS), ("neurons of every expert", INSIDE)):
        for ratio in RATIOS:
            lines += ["", f"## {ratio:.0%} of the {what} gone", ""]
            lines += ["| method | ppl in | ppl out | KL in | KL out |", "|---|---|---|---|---|"]
            lines.append(f"| dense {cells(results, ROUTER, 'dense', 0)}")
            lines += [f"| {m} {cells(results, ROUTER, m, ratio)}" for m in methods]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root")
    data_root = parser.parse_args().data_root
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    results = KeptResults(RESULTS)
    tokenizer, model, tests = loaded(ROUTER, data_root)
    judge = partial(
        measured, tests=tests, dense={name: log_p(model, ids) for name, ids in tests.items()}
    )
    results.keep(f"{ROUTER}|dense|0|0", judge(model))
    text = rows_of(tokenizer, split_text(SEEN, data_root, held_out=False))
    for draw in range(DRAWS):
        chosen = torch.randperm(len(text), generator=torch.Generator().manual_seed(draw))
        for method, how in {**COUNTS, **INSIDE}.items():
            for ratio in RATIOS:
                key = f"{ROUTER}|{method}|{ratio}|{draw}"
                if key not in results:
                    results.keep(key, judge(row(model, text[chosen[:SAMPLES]], how, ratio, draw)))
                    sys.stderr.write(f"{key}: {results[key]}\n")
    TABLE.write_text(page(results))


if __name__ == "__main__":
    main()
