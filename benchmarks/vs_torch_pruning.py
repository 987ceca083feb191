"""Torch-Pruning on the tiny models of coverage.py, beside ours: neurons, heads and residual
channels; writes docs/torch_pruning.md.

    python benchmarks/vs_torch_pruning.py             # all (a quarter of an hour on one core)
    python benchmarks/vs_torch_pruning.py --sample    # a dozen that are well known
    python benchmarks/vs_torch_pruning.py llama opt   # only these, merged into the results so far
    python benchmarks/vs_torch_pruning.py --table     # only write the table

Torch-Pruning runs twice. *Recipe*: its example for LLMs (examples/LLMs/prune_llm.py of its
repository), everything at once: modules by the example's names, heads, neurons and residual
channels, then the sizes that the example sets. *Helped*: one kind at a time, told by our discovery
which layers make the units and in how many heads or halves, and which sizes may have to follow
(five guesses); by its graph, then by its pruner; the best counts. What fails is tried again with as
many key and value heads as heads. Right means: units went from every group of the kind, the logits
equal those of zeroing what went (1e-4, statistics over what stays), and they moved. Ours is read
from outputs/coverage.json. Needs torch-pruning (extra `dev`) and the shared tools
(PRUNEKIT_SHARED).
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from typing import Any

import coverage as ours  # benchmarks/coverage.py
from coverage_table import expected, right
from vs_torch_pruning_runs import (
    Lost,
    Plan,
    by_graph,
    by_pruner,
    example_settings,
    example_sizes,
    helped_settings,
    helped_sizes,
    judge,
    prune,
)

from prunekit.errors import in_short

RESULTS = ours.ROOT / "outputs" / "torch_pruning.json"
TABLE = ours.ROOT / "docs" / "torch_pruning.md"
KINDS = ("neurons", "heads", "hidden")
SAMPLE = "llama mistral qwen2 qwen3 gemma2 phi3 gpt2 gpt_neox opt bloom falcon mixtral".split()
LIMIT = 1
"""CPU seconds for one attempt; those that end take a tenth of one."""
ENDLESS, UNGROUPED = "does not end", "right without grouped queries only"


class Late(Exception):
    """An attempt that does not end."""


# ---- one architecture


def timed(act: Callable[[], Any]) -> Any:
    """What `act` returns, if it ends within its CPU time."""

    def late(*_: Any) -> None:
        raise Late

    signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, LIMIT)
    try:
        return act()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def attempt(
    model: Any, plans: Sequence[Plan], verdict: Callable[[Any, Lost], str]
) -> dict[str, Any]:
    """Torch-Pruning by each of the plans until one is right: seconds, what is wrong, and whether
    ties hold.
    """
    seconds, why, ties = 0.0, [], True
    for plan in plans:
        start = time.perf_counter()
        try:
            pruned = copy.deepcopy(model)
            lost, _ = timed(lambda pruned=pruned, plan=plan: prune(pruned, plan))  # type: ignore[misc]
            seconds += time.perf_counter() - start
            why.append(verdict(pruned, lost))
            ties = tied(model) == tied(pruned)
        except Late:
            seconds += time.perf_counter() - start
            why.append(ENDLESS)
        except Exception as e:  # this is the finding
            seconds += time.perf_counter() - start
            why.append(in_short(e, 80))
        if not why[-1]:
            break
    return {"wrong": why[-1] and why[0], "seconds": seconds, "tied": ties}


def tied(model: Any) -> bool:
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    return None not in ends and getattr(ends[0], "weight", 0) is getattr(ends[1], "weight", 1)


def attempts(name: str, tiny: Any, sizes: Any, only: Sequence[str]) -> dict[str, Any]:
    """The recipe and each kind on one architecture in the first of the sizes that it takes."""
    from prunekit.graph.discovery import find_candidates
    from prunekit.graph.model_settings import configs

    model, inputs = ours.build(tiny, name, sizes)
    for _, config in configs(model):
        if hasattr(config, "use_cache"):
            config.use_cache = False
    known = find_candidates(model, each=2)[1]
    kinds = [k for k in KINDS if expected(name, {"moe": False}, k)]
    out = {}
    if "recipe" in only:

        def whole(pruned: Any, lost: Lost) -> str:
            return judge(
                model,
                pruned,
                inputs,
                lost,
                known,
                kinds,
                iter([example_sizes(model), lambda m: None]),
            )

        out["recipe"] = attempt(model, [by_pruner(inputs, example_settings)], whole)
    endless = "recipe" in out and out["recipe"]["wrong"] == ENDLESS
    for kind in (k for k in kinds if k in only):

        def right(pruned: Any, lost: Lost, kind: str = kind) -> str:
            return judge(
                model, pruned, inputs, lost, known, [kind], helped_sizes(model, known, kind, lost)
            )

        plans = [by_graph(inputs, known, kind)]
        if not endless:
            plans.append(by_pruner(inputs, lambda m, kind=kind: helped_settings(m, known, kind)))  # type: ignore[misc]
        out[kind] = attempt(model, plans, right)
    return out


def measure(name: str) -> dict[str, Any]:
    """What fails is tried again with as many key and value heads as heads: on grouped queries its
    walk does not end, or goes wrong.
    """
    import torch

    sys.path.insert(0, str(ours.ROOT))
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    tiny = ours.tools()
    out = attempts(name, tiny, ours.SIZES, ("recipe", *KINDS))
    again = [k for k, r in out.items() if r["wrong"]]
    if again:
        plain = tuple({**sizes, "kv": sizes.get("heads", 4)} for sizes in ours.SIZES)
        try:
            for k, r in attempts(name, tiny, plain, again).items():
                if not r["wrong"]:
                    out[k] = {**r, "wrong": UNGROUPED}
        except ours.NotBuilt:
            pass  # a class that insists on grouped queries
    return {"category": tiny.CATEGORY(name), **out}


def one(name: str) -> tuple[str, dict[str, Any]]:
    try:
        return name, measure(name)
    except ours.NotBuilt as e:
        return name, {"build": str(e)}
    except Exception as e:  # a model that our find_candidates does not get through
        return name, {"error": in_short(e, 120)}


# ---- the table


def table(theirs: dict[str, Any], mine: dict[str, Any]) -> str:
    """Both sides by architecture, and the totals."""
    built = {
        n: r for n, r in sorted(theirs.items()) if "recipe" in r and "kinds" in mine.get(n, {})
    }
    kinds = {n: [k for k in KINDS if k in r] for n, r in built.items()}
    loosened = [n for n, r in built.items() if any(not r[k]["tied"] for k in ("recipe", *kinds[n]))]
    theirs_s = sorted(sum(r[k]["seconds"] for k in kinds[n]) for n, r in built.items())
    mine_s = sorted(mine[n]["seconds"] for n in built)
    lines = [
        "# Compared with Torch-Pruning",
        "",
        "Made by `python benchmarks/vs_torch_pruning.py`; do not edit by hand.",
        "",
    ]
    lines += totals(built, kinds, mine)
    lines += [
        "",
        f"Ties of weights lost by Torch-Pruning on {len(loosened)} models, by prunekit on none "
        "that it proves.",
        "",
    ]
    lines += [
        f"Median seconds a model: prunekit {mine_s[len(mine_s) // 2]:.1f} (discovery with proof "
        "of all kinds), Torch-Pruning "
        f"{theirs_s[len(theirs_s) // 2]:.1f} (three runs, graph and cut, no proof). One core of a "
        "shared machine.",
        "",
        __doc__.split("\n\n")[2].replace("\n", " "),
        "",
    ]
    heads = [f"{who}: {k}" for k in KINDS for who in ("prunekit", "TP")]
    lines += [
        "| architecture | " + " | ".join(heads) + " | TP: recipe | prunekit s | TP s |",
        "|" + "---|" * (len(heads) + 4),
    ]
    for n, r in built.items():
        cells = []
        for k in KINDS:
            cells += (
                ["right" if right(mine[n], k) else "left alone", said(r[k]["wrong"])]
                if k in kinds[n]
                else ["-", "-"]
            )
        spent = sum(r[k]["seconds"] for k in kinds[n])
        lines.append(
            f"| {n} | {' | '.join(cells)} | {said(r['recipe']['wrong'])} | "
            f"{mine[n]['seconds']:.1f} | {spent:.1f} |"
        )
    return "\n".join([*lines, ""])


def totals(built: dict[str, Any], kinds: dict[str, list[str]], mine: dict[str, Any]) -> list[str]:
    """How many architectures are right on either side, decoder-only and all."""
    some = {
        "decoder-only": [n for n, r in built.items() if r["category"] == "decoder"],
        "all": list(built),
    }

    def row(
        label: str,
        which: Sequence[str],
        ungrouped: bool = False,
        recipe: bool = False,
        moe: bool = False,
    ) -> str:
        cells = []
        fine = {"", UNGROUPED} if ungrouped else {""}
        for names in some.values():
            has = {
                n: [k for k in which if k in kinds[n]] for n in names if mine[n]["moe"] or not moe
            }
            has = {n: ks for n, ks in has.items() if ks}
            left = sum(all(right(mine[n], k) for k in ks) for n, ks in has.items())
            other = sum(
                all(built[n][k]["wrong"] in fine for k in (["recipe"] if recipe else ks))
                for n, ks in has.items()
            )
            cells += [f"{left} of {len(has)}", f"{other} of {len(has)}"]
        return f"| {label} | {' | '.join(cells)} |"

    return [
        "| right for | " + " | ".join(f"prunekit, {c} | Torch-Pruning, {c}" for c in some) + " |",
        "|---|" + "---|" * 2 * len(some),
        *(row(k, [k]) for k in KINDS),
        row("all three", KINDS),
        row("all three, mixtures of experts only", KINDS, moe=True),
        row("all three, by its recipe", KINDS, recipe=True),
        row("heads, queries ungrouped for it", ["heads"], ungrouped=True),
        row("all three, queries ungrouped for it", KINDS, ungrouped=True),
        row(
            "all three, by its recipe, queries ungrouped for it", KINDS, ungrouped=True, recipe=True
        ),
    ]


def said(wrong: str) -> str:
    return wrong.replace("|", "/")[:90] or "right"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--sample", action="store_true")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if not ours.RESULTS.exists():
        parser.error(
            f"{ours.RESULTS} is missing: run `python benchmarks/coverage.py` first (with the same "
            "names)"
        )
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    names = [] if args.table else args.names or (SAMPLE if args.sample else ours.tools().ARCHS)
    os.environ["OMP_NUM_THREADS"] = "1"
    with get_context("spawn").Pool(1, maxtasksperchild=25) as pool:
        for name, result in pool.imap(one, names):
            results[name] = result
            RESULTS.write_text(json.dumps(results, indent=1))
            parts = {k: v["wrong"] or "right" for k, v in result.items() if isinstance(v, dict)}
            sys.stderr.write(f"{name}: {parts or result}\n")
    TABLE.write_text(table(results, json.loads(ours.RESULTS.read_text())))


if __name__ == "__main__":
    main()
