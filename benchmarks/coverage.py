"""Coverage of discovery: every causal LM architecture of transformers, tiny and random, kind by
kind; writes docs/coverage.md.

    python benchmarks/coverage.py                  # all (about half an hour on one core)
    python benchmarks/coverage.py llama mixtral    # only these, merged into the results so far
    python benchmarks/coverage.py --table          # only write the table from the results so far

For each kind of unit every group of the model loses a random share of its units at once,
differently in each, and the logits after removal are compared with those of zeroing (statistics
over the kept channels); then the same with several kinds at once. The masks, the weights and the
inputs are not those of discovery's own proof. Results are kept in outputs/coverage.json. Needs
`tiny_archs.py` of the shared tools (PRUNEKIT_SHARED).
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
import signal
import subprocess
import sys
import time
import warnings
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from coverage_table import KINDS, TOGETHER, cell, table
from kept_results import KeptResults

from prunekit.errors import in_short

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("PRUNEKIT_SHARED", ROOT.parent / "shared"))
RESULTS, TABLE = ROOT / "outputs" / "coverage.json", ROOT / "docs" / "coverage.md"
SIZES = (
    {"hidden": 48, "inter": 60, "heads": 6, "kv": 3},
    {"hidden": 64, "inter": 96, "heads": 8, "kv": 4},
    {},
)
WRONG = {"groups": 0, "off": float("inf"), "moved": 0.0, "exact": False, "tied": True}


class NotBuilt(Exception):
    """The config class accepts none of the tiny sizes."""


def tools() -> Any:
    spec = importlib.util.spec_from_file_location("tiny_archs", SHARED / "tools" / "tiny_archs.py")
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def build(tiny: Any, name: str, choices: Any = SIZES) -> tuple[Any, Any]:
    """The tiny model and its inputs; the first of the sizes that its config class accepts."""
    import torch

    errors = []
    for sizes in choices:
        try:
            model = tiny.tiny_model(name, **sizes)
            inputs = tiny.example_inputs(name, model, batch=1, seq=16, seed=5)
            with torch.no_grad():
                model(**inputs)
            return model, inputs
        except Exception as e:  # a class that refuses a tiny config is another subject
            errors.append(in_short(e, 80))
    raise NotBuilt(errors[-1])


def measure(name: str) -> dict[str, Any]:
    """Discovery and, kind by kind, the property on one architecture."""
    import torch

    from prunekit.graph.discovery import discovery, forget
    from prunekit.graph.model_settings import configs
    from prunekit.graph.sample_run import logits_of

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    tiny = tools()
    model, inputs = build(tiny, name)
    out: dict[str, Any] = {
        "category": tiny.CATEGORY(name),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    forget(model)  # another name may stand for the same classes and sizes
    start = time.perf_counter()
    found = discovery(model)
    out["seconds"] = time.perf_counter() - start
    out["left"] = [f"{place}: {reason}" for place, reason in found.left_alone]
    out["uncached"] = found.uncached
    out["moe"] = any("experts" in n and "shared" not in n for n, _ in model.named_parameters())
    for _, config in configs(model):
        if hasattr(config, "use_cache"):
            # a hybrid that lost its only attention block has no cache to ask for a length
            config.use_cache = False
    with torch.no_grad():
        dense = logits_of(model(**inputs)).float()
    out["kinds"] = {}
    for kind in KINDS:
        if any(g.kind == kind for g in found.groups):
            kept = random_masks(found, kind)
            try:
                out["kinds"][kind] = check(model, inputs, found, kind, kept, dense)
            except Exception as e:  # a pruned model that does not run is the finding
                out["kinds"][kind] = {**WRONG, "error": in_short(e, 120)}
    together = {n: m for kind in TOGETHER for n, m in random_masks(found, kind).items()}
    try:
        out["together"] = check(model, inputs, found, "together", together, dense)
    except Exception as e:  # likewise
        out["together"] = {**WRONG, "error": in_short(e, 120)}
    out["generate"] = generates(model, inputs, together)
    return out


def random_masks(found: Any, kind: str, seed: int = 11) -> dict[str, Any]:
    import torch

    draw = torch.Generator().manual_seed(seed)
    kept = {}
    for i, g in enumerate(g for g in found.groups if g.kind == kind):
        lost = min(max(1, round(g.units * (0.2, 0.4)[i % 2])), g.units - found.least.get(g.name, 1))
        if lost > 0:
            kept[g.name] = torch.ones(g.units, dtype=torch.bool)
            kept[g.name][torch.randperm(g.units, generator=draw)[:lost]] = False
    return kept


def check(
    model: Any, inputs: Any, found: Any, kind: str, kept: dict[str, Any], dense: Any
) -> dict[str, Any]:
    import torch

    from prunekit.graph import remove, zero
    from prunekit.graph.groups import Cut
    from prunekit.graph.sample_run import logits_of
    from prunekit.graph.verification import count_after, masked_logits

    cuts = [Cut.everywhere(c, kept[c.group.name]) for c in found.candidates if c.group.name in kept]
    removed = remove(copy.deepcopy(model), kept)
    with torch.no_grad():
        after = logits_of(removed(**inputs)).float()
        if kind == "blocks":
            reference = logits_of(zero(copy.deepcopy(model), kept)(**inputs)).float()
        else:
            reference = masked_logits(model, inputs, cuts, found.skip)
    parameters = sum(p.numel() for p in removed.parameters())
    exact = kind == "blocks" or parameters == count_after(model, cuts)
    scale = max(1.0, float(reference.abs().max()))
    ties = [
        m.get_input_embeddings().weight is m.get_output_embeddings().weight
        for m in (model, removed)
        if m.get_output_embeddings() is not None
    ]
    return {
        "groups": sum(g.kind == kind for g in found.groups),
        "off": float((after - reference).abs().max()) / scale,
        "moved": float((dense - reference).abs().max()) / scale,
        "exact": bool(exact),
        "tied": len(set(ties)) < 2,
    }


def generates(model: Any, inputs: Any, kept: dict[str, Any]) -> str:
    """Whether the model pruned in several kinds at once generates the same tokens, from the same
    logits, with and without a cache.
    """
    from prunekit.graph import remove
    from prunekit.graph.generation_check import cache_difference

    dense = cache_difference(copy.deepcopy(model), inputs)
    if dense:
        return f"n/a (before pruning: {dense})"[:90]
    try:
        after = cache_difference(remove(copy.deepcopy(model), kept), inputs)
    except Exception as e:  # this is the finding
        after = in_short(e, 80)
    return f"fails: {after}" if after else "same"


def one(job: tuple[str, int]) -> tuple[str, dict[str, Any]]:
    """One architecture within its time: whatever stops it is its line of the table."""
    name, limit = job
    sys.path.insert(0, str(ROOT))

    def late(*_: Any) -> None:
        raise TimeoutError(f"no result within {limit} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(limit)
    try:
        return name, measure(name)
    except NotBuilt as e:
        return name, {"build": str(e)}
    except Exception as e:  # the finding
        return name, {"error": in_short(e, 200), "category": tools().CATEGORY(name)}
    finally:
        signal.alarm(0)


def state() -> str:
    """The last commit that changed discovery; `+` where the working tree differs from it."""
    last, changed = (
        subprocess.run(
            ["git", *command, "--", "prunekit/graph"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for command in (["log", "-1", "--format=%h"], ["status", "--porcelain"])
    )
    return last + ("+" if changed else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--limit", type=int, default=900, help="seconds for one architecture")
    args = parser.parse_args()
    results = KeptResults(RESULTS)
    names = [] if args.table else args.names or tools().ARCHS
    code = state()
    os.environ["OMP_NUM_THREADS"] = "1"
    with get_context("spawn").Pool(args.jobs, initializer=os.setsid, maxtasksperchild=25) as pool:
        for name, result in pool.imap_unordered(one, [(n, args.limit) for n in names]):
            results.keep(name, {**result, "code": code})
            done = {k: cell(name, result, k) for k in KINDS} if "kinds" in result else result
            sys.stderr.write(f"{name}: {done} {result.get('generate', '')}\n")
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(table(results))


if __name__ == "__main__":
    main()
