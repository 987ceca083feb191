"""Experts removed and merged in two small mixtures that have learned something: which scores keep
what they know; writes docs/moe.md.

python benchmarks/trained_moe.py softmax --data-root FOLDER     once, and the same with sigmoid
python benchmarks/moe.py --data-root FOLDER                     some minutes on one core

Calibrated on dialogue alone, three draws of 32 x 128 tokens; tested on held-out dialogue and on
held-out instructions and Wikipedia, which the models learned too. Results are kept in
outputs/moe.json, and a row that is there is not run again.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any, get_args

import torch
from kept_results import KeptResults, by_hand
from torch import Tensor, nn
from trained_moe import DOMAINS, OUT, ROUTERS, rows_of, split_text

from prunekit import graph
from prunekit.activations.runs import ModelRun
from prunekit.criteria.experts import Score, expert_scores
from prunekit.problem import CALIBRATION, Problem
from prunekit.registry import criteria, pruners, ratios
from prunekit.scoring.experts import expert_statistics

ROOT = Path(__file__).resolve().parent.parent
RESULTS, TABLE = ROOT / "outputs" / "moe.json", ROOT / "docs" / "moe.md"
SAMPLES, TEST_ROWS, DRAWS = 32, 24, 3
SEEN = "dialogue"
RATIOS = (0.25, 0.5)
SCORES: tuple[str, ...] = get_args(Score)
OTHERS = ("aimer", "random", "reap, block by block", "naee", "hc_smoe", "ream", "ream, not aligned")
Results = dict[str, dict[str, float]]


@torch.no_grad()
def log_p(model: nn.Module, ids: Tensor) -> Tensor:
    """(N, T, V) of the next token."""
    return model(input_ids=ids).logits.float().log_softmax(-1)


def measured(model: nn.Module, tests: dict[str, Tensor], dense: dict[str, Tensor]) -> Any:
    """Perplexity by domain, and the mean KL from the dense model's distribution in nats."""
    found = {}
    for name, ids in tests.items():
        q = log_p(model, ids)
        nll = -q[:, :-1].gather(2, ids[:, 1:, None]).mean()
        found[f"ppl {name}"] = math.exp(float(nll))
        p = dense.get(name, q)
        found[f"KL {name}"] = float((p.exp() * (p - q)).sum(-1).mean())
    return found


def asked(method: str, seed: int, statistics: Any) -> tuple[Any, Any]:
    """(pruner, criterion) of a row."""
    whole = {"name": "oneshot", "kinds": ["experts"]}
    if method in SCORES:

        def known(model: Any, groups: Any, run: Any) -> Any:
            return {g.name: expert_scores(statistics[g.name], method).float() for g in groups}  # type: ignore[arg-type]

        return whole, known
    if method == "aimer":
        return whole, criteria.build({"name": "aimer"})
    if method == "random":
        return whole, criteria.build({"name": "random", "seed": seed})
    if method == "reap, block by block":
        return whole | {"name": "layerwise"}, criteria.build({"name": "experts"})
    options = {"name": method.partition(",")[0]}
    return options | ({"align": False} if "not aligned" in method else {}), None


def loaded(router: str, data_root: str | None) -> tuple[Any, nn.Module, dict[str, Tensor]]:
    """The tokenizer, the mixture, and its tests by domain."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(OUT / router)
    model = AutoModelForCausalLM.from_pretrained(OUT / router).float().eval()
    tests = {}
    for d in DOMAINS:
        held_out = rows_of(tokenizer, split_text(d, data_root, held_out=True))
        every = torch.linspace(0, len(held_out) - 1, TEST_ROWS).long()
        tests[d] = held_out[every]
    return tokenizer, model, tests


def rows(router: str, data_root: str | None) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Each row's key and how it is measured, draw after draw."""
    tokenizer, model, tests = loaded(router, data_root)
    dense = {name: log_p(model, ids) for name, ids in tests.items()}
    text = rows_of(tokenizer, split_text(SEEN, data_root, held_out=False))
    groups = [g for g in graph.discover(model) if g.kind == "experts"]
    yield f"{router}|dense|0|0", partial(measured, model, tests, dense)
    for draw in range(DRAWS):
        chosen = torch.randperm(len(text), generator=torch.Generator().manual_seed(draw))
        tokens = text[chosen[:SAMPLES]]
        statistics = expert_statistics(model, groups, ModelRun(model, tokens))
        for method in (*SCORES, *OTHERS):
            for ratio in RATIOS:
                key = f"{router}|{method}|{ratio}|{draw}"
                yield (
                    key,
                    partial(
                        row,
                        model,
                        tokens,
                        asked(method, draw, statistics),
                        ratio,
                        partial(measured, tests=tests, dense=dense),
                    ),
                )


def row(model: nn.Module, tokens: Tensor, how: Any, ratio: float, judge: Any) -> Any:
    """Prunes a copy and measures it."""
    pruner, criterion = how
    pruned = copy.deepcopy(model)
    share = ratios.build({"name": "uniform", "target": ratio, "of": "units"})
    pose = Problem(pruned, token_sets={CALIBRATION: tokens}, criterion=criterion, ratio=share)
    pruners.build(pruner)(pose)
    return judge(pruned)


def cells(results: Results, router: str, method: str, ratio: float) -> str:
    """Means and deviations over the draws, as a row of the table."""
    draws = [v for k, v in results.items() if k.startswith(f"{router}|{method}|{ratio}|")]
    if not draws:
        return "| | | | |"
    out = []
    others = [d for d in DOMAINS if d != SEEN]
    for what in ("ppl", "KL"):
        for names in ([SEEN], others):
            v = [mean(d[f"{what} {n}"] for n in names) for d in draws]
            digits = 1 if what == "ppl" else 3
            off = f" ± {stdev(v):.{digits}f}" if len(v) > 1 else ""
            out.append(f"{mean(v):.{digits}f}{off}")
    return "| " + " | ".join(out) + " |"


def table(results: Results, notes: str) -> str:
    """The page."""
    lines = [
        "# Experts of a trained mixture",
        "",
        "Made by `python benchmarks/moe.py`; do not edit by hand (but for the words at the end).",
        "",
        "Two mixtures of 16 experts, two a token, four blocks, trained for nine minutes on",
        "dialogue, instructions and Wikipedia: `softmax` is a Mixtral, `sigmoid` a GLM-4.5 with a",
        "correction bias, a shared expert and a dense first block. Calibrated on dialogue alone,",
        "32 x 128 tokens. *in*: held-out dialogue, *out*: the mean of held-out instructions and",
        "Wikipedia; 24 x 128 tokens of each. KL in nats a token, from the dense model. Means of",
        "three draws of the calibration text, ± their standard deviation.",
    ]
    for router in ROUTERS:
        for ratio in RATIOS:
            lines += ["", f"## {router}, {ratio:.0%} of the experts gone", ""]
            lines += ["| method | ppl in | ppl out | KL in | KL out |", "|---|---|---|---|---|"]
            lines.append(f"| dense {cells(results, router, 'dense', 0)}")
            lines += [f"| {m} {cells(results, router, m, ratio)}" for m in (*SCORES, *OTHERS)]
    return "\n".join(lines) + "\n" + notes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root")
    data_root = parser.parse_args().data_root
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    results = KeptResults(RESULTS)
    for router in ROUTERS:
        for key, compute in rows(router, data_root):
            if key not in results:
                results.keep(key, compute())
                sys.stderr.write(f"{key}: {results[key]}\n")
    notes = by_hand(TABLE, "## What agrees with the papers")
    TABLE.write_text(table(results, notes))


if __name__ == "__main__":
    main()
