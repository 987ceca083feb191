"""Scores and removal of experts on every mixture of experts of transformers, tiny and random;
writes docs/expert_coverage.md.

python benchmarks/expert_coverage.py             all architectures (some minutes on one core)
python benchmarks/expert_coverage.py mixtral     only these, merged into the results so far

*scores*: the sums of one pass against the experts run one at a time, the writers of all others set
to zero. *removal*: a random third of the experts removed, against the router's logits of the same
experts at the lowest there is. *stock*: the same number from every layer leaves a model that
transformers' own class builds. *CPU s*: of the one thread that all of it takes, which other jobs on
the machine do not lengthen. Results are kept in outputs/expert_coverage.json. Needs
`tiny_archs.py` of the shared tools (PRUNEKIT_SHARED).
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from coverage import NotBuilt, build, tools
from kept_results import KeptResults

from prunekit import graph
from prunekit.activations.hooks import first_tensor
from prunekit.activations.runs import ModelRun
from prunekit.checkpoint.stock_config import stock_config
from prunekit.errors import ConfigError, in_short
from prunekit.graph.discovery import discovery
from prunekit.graph.expert_neurons import around, module_around
from prunekit.graph.gate_places import writers_of
from prunekit.graph.groups import Cut
from prunekit.graph.sample_run import ERRORS, logits_of
from prunekit.graph.verification import masked_logits
from prunekit.scoring.experts import expert_parents, expert_statistics, routed
from prunekit.types import tensor_of

ROOT = Path(__file__).resolve().parent.parent
RESULTS, TABLE = ROOT / "outputs" / "expert_coverage.json", ROOT / "docs" / "expert_coverage.md"


def scores_off(model: Any, ids: Any, found: Any, groups: Any) -> float:
    """The largest relative difference between the sums of g |f| and those of the experts run one
    at a time.
    """
    seen: dict[str, Any] = {}
    hooks = []
    for g in groups:

        def keep(m: Any, args: Any, kwargs: Any, out: Any, name: str = g.name) -> None:
            seen.setdefault(name, (m, args, kwargs))

        def keep_routed(m: Any, args: Any, kwargs: Any, out: Any, name: str = g.name) -> None:
            if routed(m, args, kwargs) is not None:
                seen.setdefault(name, (m, args, kwargs))

        # Where no experts are called with a routing, the innermost module around them.
        watched = [(path, keep_routed) for path in expert_parents(model, g)]
        watched += [(path, keep) for path in around(module_around(g))]
        for path, see in watched:
            module = model.get_submodule(path)
            hooks.append(module.register_forward_hook(see, with_kwargs=True))
    with torch.no_grad():
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    statistics = expert_statistics(model, groups, ModelRun(model, ids))
    written, worst = writers_of(found.candidates), 0.0
    for g in groups:
        module, args, kwargs = seen[g.name]
        writers = [m for m in g.members if m.param in written]
        own = {m.param: tensor_of(model, m.param).detach().clone() for m in writers}

        def output(left: int | None) -> Any:
            with torch.no_grad():
                for m in writers:  # noqa: B023 (called in its own round only)
                    t = tensor_of(model, m.param)
                    t.copy_(own[m.param])  # noqa: B023
                    gone = [u for u in range(g.units) if u != left]  # noqa: B023
                    t.index_fill_(m.axis, m.index[gone].reshape(-1), 0)
                out = first_tensor(module.forward(*args, **kwargs))  # noqa: B023
                return out.reshape(-1, model.config.hidden_size)

        none = output(None)
        one = torch.stack([(output(u) - none).norm(dim=1).sum() for u in range(g.units)]).double()
        with torch.no_grad():
            for m in writers:
                tensor_of(model, m.param).copy_(own[m.param])
        scale = max(float(one.max()), 1e-9)
        worst = max(worst, float((statistics[g.name].weighted_norm - one).abs().max()) / scale)
    return worst


def masks(groups: Any, least: Any, same: bool) -> dict[str, Any]:
    draw, kept = torch.Generator().manual_seed(3), {}
    for i, g in enumerate(groups):
        lost = min(1 if same else 1 + i % 2, g.units - least.get(g.name, 1))
        kept[g.name] = torch.ones(g.units, dtype=torch.bool)
        kept[g.name][torch.randperm(g.units, generator=draw)[:lost]] = False
    return kept


def removal_off(model: Any, ids: Any, found: Any, groups: Any) -> float:
    kept = masks(groups, found.least, same=False)
    cuts = [Cut.everywhere(c, kept[c.group.name]) for c in found.candidates if c.group in groups]
    masked = masked_logits(model, {"input_ids": ids}, cuts, found.skip)
    with torch.no_grad():
        removed = logits_of(graph.remove(copy.deepcopy(model), kept)(input_ids=ids)).float()
    return float((masked - removed).abs().max()) / max(1.0, float(masked.abs().max()))


def measure(name: str) -> dict[str, Any]:
    start = time.process_time()
    model, inputs = build(tools(), name)
    ids = inputs["input_ids"]
    found = discovery(model)
    groups = [g for g in found.groups if g.kind == "experts"]
    out: dict[str, Any] = {"groups": len(groups), "experts": [g.units for g in groups]}
    if not groups:
        return out
    for key, ask in (("scores", scores_off), ("removal", removal_off)):
        try:
            out[key] = ask(model, ids, found, groups)
        except (ConfigError, *ERRORS) as e:
            out[key] = in_short(e, 110)
    try:
        small = graph.remove(copy.deepcopy(model), masks(groups, found.least, same=True))
        out["stock"] = stock_config(small) is not None
    except (ConfigError, *ERRORS) as e:
        out["stock"] = in_short(e, 110)
    return out | {"seconds": time.process_time() - start}


def cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "self-contained"
    if isinstance(value, float):
        return "right" if value < 1e-4 else f"**wrong** ({value:.1e})"
    return str(value).replace("|", "/")


def line_of(name: str, r: dict[str, Any]) -> str:
    """An architecture that failed, or in which no experts were found, has its line too."""
    if not r.get("groups"):
        why = r.get("error", "no experts were found").splitlines()[0]
        return f"| {name} | 0 | **{why.replace('|', '/')}** | | | |"
    made = " | ".join(cell(r[k]) for k in ("scores", "removal", "stock"))
    return f"| {name} | {r['groups']} | {made} | {r['seconds']:.1f} |"


def table(results: dict[str, Any]) -> str:
    rows = dict(sorted(results.items()))
    right = {
        k: sum(cell(r.get(k, "")) == "right" for r in rows.values()) for k in ("scores", "removal")
    }
    stock = sum(r.get("stock") is True for r in rows.values())
    slow = sorted(rows, key=lambda n: -rows[n].get("seconds", 0))[:5]
    lines = [
        "# Coverage of experts",
        "",
        "Made by `python benchmarks/expert_coverage.py`; do not edit by hand.",
        "",
        f"Of {len(rows)} architectures: scores right on {right['scores']}, removal equal to"
        f" masking on {right['removal']}, stock transformers loads the result of uniform counts on"
        f" {stock}.",
        "",
        "*scores*: sums of g |f| from one pass, against the experts run one at a time, the others'",
        "writers set to zero. *removal*: a random third of the experts gone, against the same with",
        "their router logits at the lowest there is. *stock*: one expert of every group gone; of",
        "deepseek_v4 the first block picks by a table of tokens and keeps all, so no single number",
        "of experts fits.",
        "*CPU s*: of one thread, for discovery and all three.",
        "",
        "| architecture | groups | scores | removal | stock | CPU s |",
        "|---|---|---|---|---|---|",
    ]
    lines += [line_of(n, r) for n, r in rows.items()]
    slowest = ", ".join(f"{n} {rows[n].get('seconds', 0):.0f} s" for n in slow)
    return "\n".join([*lines, "", f"Slowest: {slowest}.", ""])


def mixtures() -> list[str]:
    """The architectures whose experts docs/coverage.md lists."""
    cells = [line.split("|") for line in (ROOT / "docs" / "coverage.md").read_text().splitlines()]
    return [c[1].strip() for c in cells if len(c) > 10 and c[6].strip().startswith("proven")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    names = parser.parse_args().names or mixtures()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    results = KeptResults(RESULTS)
    for name in names:
        try:
            results.keep(name, measure(name))
        except NotBuilt as e:
            results.keep(name, {"error": f"not built: {str(e)[:110]}"})
        except Exception as e:  # this is the finding
            results.keep(name, {"error": f"{type(e).__name__}: {str(e)[:110]}"})
        sys.stderr.write(f"{name}: {results[name]}\n")
    TABLE.write_text(table(results))


if __name__ == "__main__":
    main()
