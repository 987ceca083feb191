"""Every registered method as a problem that it can solve, and the random models that it is given:
the rows of `benchmarks/gpu.py` that prune.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # the tiny models of every architecture

from tiny_models import tiny_model

from prunekit.problem import Problem, named_sets
from prunekit.ratios.level_search import Budgeted
from prunekit.registry import REGISTRIES, Component, criteria, pruners, ratios
from prunekit.types import Pruned

Node = dict[str, Any]
UNITS: Node = {"name": "uniform", "target": 0.25, "of": "units"}
ELEMENTS: Node = {"name": "uniform", "target": 0.5, "of": "prunable"}
EXPERTS = "qwen2_moe"
SHAPES: dict[str, dict[str, int]] = {
    "1.1B": {"hidden": 2048, "ffn": 5632, "heads": 32, "kv": 4, "layers": 22},
    "7B": {"hidden": 4096, "ffn": 11008, "heads": 32, "kv": 32, "layers": 32},
}
SMALL = {"hidden": 64, "ffn": 128, "heads": 4, "kv": 2, "layers": 4}
VOCABULARY = 32000
AGREES = 0.95
"""Share of units. ALPS, which fits for hundreds of steps, turns rounding into 1 % of others."""
OPTIONS: dict[str, Node] = {
    "bonsai": {"masks": 10, "rounds": 1},
    "copal": {"held_out": 2},
    "laco": {"merge": 2},
    "laser": {"targets": ["up_proj"], "layers": [0], "shares": [0.2]},
    "llm_surgeon": {"shots": 2},
    "nas": {"steps": 1, "batch": 3, "micro_batch": 1, "warmup_steps": 0, "samples": 4},
    "evolution": {"window": 16, "tokens": [64, 128], "generations": 2},
    "expert_evolution": {
        "window": 16,
        "tokens": 128,
        "population": 4,
        "parents": 2,
        "generations": 2,
    },
    "predictor": {"window": 16, "tokens": 128, "samples": 16},
    "random": {"window": 16, "tokens": 128, "samples": 4},
}
"""Options of pruners and ratios whose defaults ask for more than a short check has."""
OF_EXPERTS = ("expert_neurons", "moe_pruner")
"""Pruners of neurons or weights that only experts have."""
LEARNED = ("compresso", "nuteprune", "sheared_llama")
"""Pruners that draw masks on the device, by its own generator: no two devices choose alike."""
VARIANTS: tuple[tuple[Node, Node | None, Node | None], ...] = (
    ({"name": "sparsegpt", "pattern": "2:4"}, None, ELEMENTS),
    (
        {"name": "sparse_database", "refit": False},
        None,
        {"name": "milp", "target": 0.5, "of": "prunable"},
    ),
    ({"name": "unstructured", "pattern": "2:4", "permute": True}, {"name": "ria"}, ELEMENTS),
    (
        {"name": "unstructured", "schedule": "whole"},
        {"name": "wanda"},
        ELEMENTS | {"ranking": "global"},
    ),
    ({"name": "oneshot", "kinds": ["hidden"]}, {"name": "taylor"}, UNITS),
    ({"name": "oneshot", "steps": 2}, {"name": "taylor", "mode": "param_mix"}, UNITS),
    (
        {"name": "oneshot", "compensate": "bias"},
        {"name": "flap"},
        UNITS | {"ranking": "global"},
    ),
    ({"name": "obs", "target": "dense"}, None, UNITS),
    ({"name": "laser", "search": "none"} | OPTIONS["laser"], None, None),
    ({"name": "obs"}, None, {"name": "cost", "target": 0.25, "of": "units"}),
)
"""Further paths through the methods: pruner, criterion, ratio."""


class Disagree(Exception):
    """Two devices, or two runs, chose otherwise or computed something else."""


@dataclass(frozen=True)
class Bench:
    """Where the checks run, and how small: `layers` at most in models that methods prune, `small`
    takes tiny shapes for a CPU.
    """

    device: torch.device
    layers: int = 4
    small: bool = False
    real: str | None = None

    def tokens(self, samples: int = 8, length: int = 128) -> Tensor:
        """(N, T) random ids, fewer and shorter where small."""
        shape = (samples, 16 if self.small else length)
        return torch.randint(8, 100, shape, generator=torch.Generator().manual_seed(0))

    def model(self, name: str, layers: int | None = None) -> nn.Module:
        """Random weights of the shape `name`, in bfloat16, made on the device."""
        from transformers import AutoModelForCausalLM, LlamaConfig

        shape = SMALL if self.small else SHAPES[name]
        config = LlamaConfig(
            vocab_size=512 if self.small else VOCABULARY,
            hidden_size=shape["hidden"],
            intermediate_size=shape["ffn"],
            num_attention_heads=shape["heads"],
            num_key_value_heads=shape["kv"],
            num_hidden_layers=min(layers or shape["layers"], shape["layers"]),
            pad_token_id=0,
        )
        torch.manual_seed(0)
        with torch.device(self.device):
            return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


@dataclass(frozen=True)
class Method:
    """A pruner with the criterion and the ratio that it is tried with."""

    pruner: Node
    criterion: Node | None
    ratio: Node | None
    arch: str = "llama"
    name: str = field(default="")

    def __post_init__(self) -> None:
        parts = (self.pruner, self.criterion, self.ratio)
        words = [_said(p) for p in parts if p and p not in (UNITS, ELEMENTS)]
        object.__setattr__(self, "name", ", ".join(words))

    def problem(self, model: nn.Module, tokens: Tensor) -> Problem:
        """`model` with `tokens (N, T)`, of which each half is also a text of its own."""
        half = len(tokens) // 2
        return Problem(
            model,
            token_sets=named_sets({"first": tokens[:half], "second": tokens[half:]}),
            criterion=_part("criterion", self.criterion),
            ratio=_part("ratio", self.ratio),
        )

    def prune(self, model: nn.Module, tokens: Tensor) -> Pruned:
        """Prunes in place, checked first as the runner does."""
        built = pruners.build(self.pruner)
        problem = self.problem(model, tokens)
        if "check" in built.meta:
            built.meta["check"](problem, **built.options)
        pruned: Pruned = built(problem)
        return pruned


def _said(node: Node) -> str:
    """A component as a row's name has it: the share that goes is left out, and what short text and
    few blocks ask for.
    """
    left_out = {"name", "of", *OPTIONS.get(node["name"], ())}
    shown = {k: v for k, v in node.items() if k not in left_out and not isinstance(v, float)}
    words = [f"{k}={'+'.join(v) if isinstance(v, list) else v}" for k, v in shown.items()]
    return " ".join([node["name"], *words])


def _part(kind: str, node: Node | None) -> Component | None:
    return REGISTRIES[kind].build(node) if node else None


def methods() -> Iterator[Method]:
    """Every registered pruner, criterion and ratio at least once, and the variants."""
    seen = set()
    for method in (*of_pruners(), *of_criteria(), *of_ratios(), *(Method(*v) for v in VARIANTS)):
        if method.name not in seen:
            seen.add(method.name)
            yield method


def of_pruners() -> Iterator[Method]:
    """Each pruner by what its registration says."""
    for name in (n for n in pruners.names() if n not in LEARNED):
        meta = pruners.entry(name).meta
        zeros = meta.get("out") == "zeros"
        criterion = {"name": "wanda" if zeros else "wanda_sp"} if meta.get("scored") else None
        node = {"name": name} | OPTIONS.get(name, {})
        ratio = None if name in ("adainfer", "laser") else ELEMENTS if zeros else UNITS
        experts = meta.get("kinds") == ("experts",) or name in OF_EXPERTS
        yield Method(node, criterion, ratio, EXPERTS if experts else "llama")


def of_criteria() -> Iterator[Method]:
    """Each criterion under a pruner of the units that it scores."""
    for name in criteria.names():
        kinds = criteria.entry(name).meta["kinds"]
        if kinds == ("weights",):
            yield Method({"name": "unstructured"}, {"name": name}, ELEMENTS)
        elif len(kinds) == 1:
            arch = EXPERTS if kinds == ("experts",) else "llama"
            yield Method({"name": "oneshot", "kinds": list(kinds)}, {"name": name}, UNITS, arch)
        else:
            yield Method({"name": "oneshot"}, {"name": name}, UNITS)


def of_ratios() -> Iterator[Method]:
    """Each ratio, dividing experts or the elements of matrices, or choosing among local
    solutions.
    """
    for name in ratios.names():
        if ratios.entry(name).types.get("of") == Budgeted:
            node = {"name": name, "target": 0.25} | OPTIONS.get(name, {})
            yield Method({"name": "database"}, None, node)
        elif name == "expert_evolution":
            node = {"name": name, "target": 0.25} | OPTIONS[name]
            yield Method(
                {"name": "oneshot", "kinds": ["experts"]}, {"name": "experts"}, node, EXPERTS
            )
        elif name not in ("uniform", "cost"):  # uniform is everywhere, cost among the variants
            node = {"name": name, "target": 0.5}
            yield Method({"name": "unstructured"}, {"name": "wanda"}, node)


def agree(method: Method, bench: Bench) -> str:
    """A float32 model of a few thousand parameters, pruned on the CPU and on the device: the share
    of units on which both agree, and how far apart the logits of the pruned models are.
    """
    text = torch.randint(8, 100, (8, 24), generator=torch.Generator().manual_seed(1))
    on_cpu = tiny_model(method.arch, 4)
    there = copy.deepcopy(on_cpu).to(bench.device)
    expected = method.prune(on_cpu, text)
    waits, found = counted_waits(lambda: method.prune(there, text), bench.device)
    share, units = agreement(expected, found)
    with torch.no_grad():
        a = on_cpu(text).logits
        gap = relative(a, there(text.to(bench.device)).logits.cpu())
    note = f"{share:.2%} of {units:,} units, logits {gap:.0e}{waits}"
    if share < AGREES or gap > 0.2:
        raise Disagree(note)
    return note


def agreement(a: Pruned, b: Pruned) -> tuple[float, int]:
    """Share of units on which both choose the same, and how many units were there to choose."""
    if a.kept.keys() != b.kept.keys():
        raise Disagree(f"pruned {len(a.kept)} and {len(b.kept)} groups, not the same ones")
    total = sum(k.numel() for k in a.kept.values())
    same = sum(int((k.cpu() == b.kept[n].cpu()).sum()) for n, k in a.kept.items())
    return (same / total if total else 1.0), total


def relative(expected: Tensor, found: Tensor) -> float:
    """Distance over the size of what was expected."""
    if not bool(found.isfinite().all()):
        raise Disagree("logits are not finite")
    return float((expected.float() - found.float()).norm() / expected.float().norm())


WAITS: dict[str, int] = {}
"""Source line -> how often the host waited for the device there, over all methods."""


def counted_waits(work: Callable[[], Any], device: torch.device) -> tuple[str, Any]:
    """What `work` returns, and in words how often the host waited for the device meanwhile."""
    if device.type != "cuda":
        return "", work()
    import warnings

    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            result = work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    lines = [f"{w.filename}:{w.lineno}" for w in seen if "synchroniz" in str(w.message)]
    for line in lines:
        WAITS[line] = WAITS.get(line, 0) + 1
    return f", {len(lines)} waits", result


def prune_shape(method: Method, shape: str, bench: Bench) -> str:
    """A few blocks of a real size in bfloat16, pruned and run."""
    model = bench.model(shape, bench.layers)
    before = sum(p.numel() for p in model.parameters())
    pruned = method.prune(model, bench.tokens())
    with torch.no_grad():
        logits = pruned.model(bench.tokens(1).to(bench.device)).logits
    if not bool(logits.isfinite().all()):
        raise Disagree("logits are not finite")
    left = sum(int(p.count_nonzero()) for p in pruned.model.parameters())
    return f"{left / before:.0%} of {before / 1e6:,.0f} M weights"
