"""Configurations for the fuzzer: a method with what it goes together with, other components here
and there, and one or two values that are anything.
"""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import yaml
from compositions import config
from fuzzing import EDGES, WORDS, at, leaves, put
from paths import ROOT

FILLED = {"${seed}": 1, "${data_root}": None}
ONE = {"name": "crop", "dataset": "pydocs", "samples": 2, "length": 16}
SHARES = {"a": {"name": "crop", "dataset": "pydocs", "share": 0.5}}
SHARES["b"] = {"name": "self", "share": 0.5}
FEWER = {
    "calib": {"samples": 4, "length": 16},
    "crop": {"dataset": "pydocs"},
    "sequence": {"texts": {"a": ONE, "b": ONE}},
    "mix": {"texts": SHARES},
    "general": {"texts": SHARES},
    "recovery": {"max_length": 32, "max_steps": 2, "dataset": "pydocs", "batch": 8},
    "distill": {"micro_batch": 4, "validation_size": 2},
    "perp": {"micro_batch": 4, "validation_size": 2},
    "reconstruct": {"samples": 4, "length": 16, "steps": 2, "batch": 2},
    "bonsai": {"masks": 10, "rounds": 1},
    "ends": {"first": 1},
    "llm_surgeon": {"shots": 2},
    "llm_surgeon_matrices": {"shots": 2},
    "copal": {"held_out": 1},
    "range": {"heads": [1, 3], "neurons": [0, 3]},
}
"""What makes them run in seconds, of a kind or of one component."""

PAIRS = """
oneshot taylor uniform         | oneshot l2 global            | oneshot random uniform
depth block_influence uniform  | depth block_taylor uniform   | greedy block_ppl uniform
channel l1 uniform             | layerwise wanda_sp uniform   | flap flap global
obs none uniform               | obs none cost                | slicegpt none uniform
bonsai none uniform            | llm_surgeon none global      | laco none uniform
adainfer none none             | laser none none              | copal none uniform
unstructured wanda uniform     | unstructured ria owl         | unstructured wanda besa
unstructured dass uniform      | sparsegpt none uniform       | admm none uniform
alps none uniform              | sparsellm none uniform       | llm_surgeon_matrices none global
database none uniform          | sparse_database none uniform
"""
METHODS = [tuple(pair.split()) for pair in PAIRS.replace("|", "\n").splitlines() if pair.strip()]
SINGLE = ("unstructured", "sparsegpt", "admm", "alps", "sparsellm", "copal", "llm_surgeon_matrices")
SINGLE += ("sparse_database",)
SMALL = {"eval": ("none", "quick", "exits"), "model": ("tiny_llama", "hf", "llama2_7b")}
SMALL["calib"] = ("pydocs", "crop", "c4", "self", "mix", "general", "sequence")
SMALL["recovery"] = ("none", "lora_text", "distill", "perp", "reconstruct")
"""Kinds of which some choices take minutes or a download."""


def names(kind: str) -> list[str]:
    """What a kind has to choose from here."""
    return list(SMALL.get(kind, sorted(p.stem for p in (ROOT / "conf" / kind).glob("*.yaml"))))


def usual() -> dict[str, Any]:
    """The usual composition, composed once."""
    return json.loads(_usual())


@cache
def _usual() -> str:
    return json.dumps(config())


@cache
def node_of(kind: str, name: str) -> dict[str, Any]:
    """One component's YAML in little, what it builds on included; composing takes a second each."""
    node = yaml.safe_load((ROOT / "conf" / kind / f"{name}.yaml").read_text()) or {}
    below: dict[str, Any] = {}
    for other in node.pop("defaults", []):
        if other != "_self_":
            base, _, place = str(other).partition("@")
            below |= {place: node_of(kind, base)} if place else node_of(kind, base)
    node = {k: FILLED.get(str(v), v) for k, v in (below | node).items()}
    fewer = FEWER.get(kind, {}) | FEWER.get(name, {})
    return node | {k: v for k, v in fewer.items() if k in node}


def method(pruner: str, criterion: str, ratio: str) -> dict[str, Any]:
    """A composition of what belongs together."""
    chosen = {"pruner": pruner, "criterion": criterion, "ratio": ratio}
    cfg = usual() | {k: copy.deepcopy(node_of(k, v)) for k, v in chosen.items()}
    if pruner in SINGLE and "of" in cfg["ratio"]:
        cfg["ratio"] |= {"of": "prunable", "target": 0.5}
    if pruner == "copal":
        cfg["calib"] = copy.deepcopy(node_of("calib", "sequence"))
    return cfg


def anything(rng: Random, depth: int = 2) -> Any:
    """Whatever YAML can hold."""
    kind = rng.choice(["edge", "edge", "word", "int", "float", "text", "list", "dict"])
    if depth and kind == "list":
        return [anything(rng, depth - 1) for _ in range(rng.randrange(3))]
    if depth and kind == "dict":
        return {rng.choice(WORDS): anything(rng, depth - 1) for _ in range(rng.randrange(2))}
    if kind == "text":
        return "".join(chr(rng.randrange(1, 0x500)) for _ in range(rng.randrange(6)))
    if kind == "word":
        return rng.choice(WORDS)
    if kind == "float":
        return rng.choice([1.0, -1.0]) * 10 ** rng.uniform(-6, 6)
    return rng.randint(-5, 200) if kind == "int" else rng.choice(EDGES)


def near(rng: Random, value: Any) -> Any:
    """Another value of the same type, which gets further than one of another type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice([value + rng.randint(-3, 3), rng.randint(-2, 4 * abs(value) + 8)])
    if isinstance(value, float):
        return rng.choice([0.0, -value, value / 2, value * 2, value * 1e6, rng.random()])
    if isinstance(value, str):
        return rng.choice(WORDS)
    if isinstance(value, list) and value:
        return [rng.choice(value) for _ in range(rng.randrange(len(value) + 2))]
    return rng.choice([True, 0, 1, 2, 3, 0.5, [0, 1], [1, 3], ["heads"], *WORDS])


def drawn(rng: Random, models: tuple[str, ...] = (), texts: tuple[Path, ...] = ()) -> Any:
    """A composition, and what was changed in it: [(place, value)]. `models` are folders and `texts`
    files that may take the places of the usual ones.
    """
    cfg, changed = method(*rng.choice(METHODS)), []
    for kind in ("model", "calib", "exclude", "recovery", "eval", "ratio", "criterion"):
        if rng.random() < (0.05 if kind in ("ratio", "criterion", "model") else 0.2):
            name = rng.choice(names(kind))
            cfg[kind] = copy.deepcopy(node_of(kind, name))
            changed.append((kind, name))
    if models and rng.random() < 0.4:
        path = rng.choice(models)
        cfg["model"] = node_of("model", "hf") | {"path": path, "device": "cpu"}
        changed.append(("model.path", Path(path).name))
    if texts and rng.random() < 0.15:
        file = rng.choice(texts)
        cfg["calib"] = node_of("calib", "text") | {"path": str(file)}
        changed.append(("calib.path", file.name))
    for _ in range(rng.choice([1, 1, 2])):
        inner = [k for k, v in cfg.items() if isinstance(v, dict) and v and k != "track"]
        top = [k for k, v in cfg.items() if k != "out" and k not in inner]
        own = [k for k in ("pruner", "criterion", "ratio") if k in inner]
        key = rng.choice(own * 2 + inner * 2 + top[:1] if rng.random() < 0.9 else top)
        below = [(key, *p) for p in leaves(cfg[key]) if p[-1] != "name"]
        whole = [(key,)] + ([(key, "name")] if key in inner and "name" in cfg[key] else [])
        place = rng.choice(below if below and rng.random() < 0.95 else whole)
        value = near(rng, at(cfg, place)) if rng.random() < 0.7 else anything(rng)
        changed.append((".".join(map(str, place)), f"{at(cfg, place)!r:.40} -> {value!r:.60}"))
        put(cfg, place, value)
    return cfg, changed
