"""Settings in configs and modules that decide which code runs: attention and experts in plain
operations, no cache, how many experts a router picks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from prunekit.graph.expert_neurons import around
from prunekit.graph.sample_run import ERRORS, inputs_for

IMPLEMENTATIONS = ("_attn_implementation", "_experts_implementation")


def configs(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every config object that a module holds, once, with the path of the first module that holds
    it.
    """
    seen: set[int] = set()
    for path, module in model.named_modules():
        config = getattr(module, "config", None)
        if hasattr(config, "__dict__") and id(config) not in seen:
            seen.add(id(config))
            yield path, config


def use_plain_code(model: nn.Module) -> None:
    """Plain attention and expert code, no cache: what the tracer reads best. Modules that are not
    transformers' have no such switches.

    A class whose plain attention does not run keeps its own.
    """
    for _, config in configs(model):
        if hasattr(config, "use_cache"):
            config.use_cache = False
    for k in IMPLEMENTATIONS:
        own = [(c, getattr(c, k)) for _, c in configs(model) if getattr(c, k, "eager") != "eager"]
        for config, value in own:
            vars(config).setdefault("_own_implementations", {})[k] = value
            setattr(config, k, "eager")
        try:
            with torch.no_grad():
                _ = model(**inputs_for(model)) if own else None
        except ERRORS:
            for config, value in own:
                del vars(config)["_own_implementations"][k]
                setattr(config, k, value)


def restore_own_code(model: nn.Module) -> bool:
    """Undo `use_plain_code`'s choice of attention and experts; False where there was none."""
    changed = False
    for _, config in configs(model):
        for k, value in vars(config).pop("_own_implementations", {}).items():
            changed = changed or getattr(config, k) != value
            setattr(config, k, value)
    return changed


def pick_all_experts(model: nn.Module, picks: Sequence[tuple[str, int, int]]) -> bool:
    """Let every router pick all its experts, so that a trace meets each of them. `picks`: (module,
    k, of how many) of the top-k ops seen.
    """
    changed = False
    for scope, k, n in picks:
        modules = [model.get_submodule(path) for path in around(scope)]
        own = [m.config for m in modules if hasattr(getattr(m, "config", None), "__dict__")]
        for holder in [*modules, *own]:
            for attr, value in list(vars(holder).items()):
                picked = type(value) is int and value == k < n
                if picked and any(part in attr for part in ("top", "per_tok")):
                    setattr(holder, attr, n)
                    changed = True
    return changed
