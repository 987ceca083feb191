"""NaN and infinity stop a job where they first appear, with the name of the layer and the stage."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.activations.runs import forward
from prunekit.architecture.mapped import release
from prunekit.errors import NotFinite
from prunekit.registry import Component
from prunekit.types import Group, Run, Scores

PROBE = 16
"""Ids of a sample on which the layer is looked for."""
HINT = "; allow_nonfinite=true goes on all the same"


@torch.no_grad()
def check_weights(model: nn.Module, stage: str) -> None:
    """Raises NotFinite naming the first weight that is not finite. Weights that accelerate keeps
    elsewhere are left out.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.is_floating_point() and not p.is_meta]
    by_device: dict[torch.device, list[Tensor]] = {}
    for _, p in named:
        by_device.setdefault(p.device, []).append(p.isfinite().all())
        release([p])
    if all(bool(torch.stack(flags).all()) for flags in by_device.values()):  # one wait a device
        return
    name, bad = next((n, p) for n, p in named if not bool(p.isfinite().all()))
    count = int((~bad.isfinite()).sum())
    raise NotFinite(
        f"{stage}: {name} holds {count} of {bad.numel()} elements that are not finite{HINT}"
    )


def check_numbers(stage: str, numbers: Mapping[str, float], model: nn.Module) -> None:
    """Raises NotFinite naming the first number that is not finite, and the layer from which that
    comes.
    """
    bad = [k for k, v in numbers.items() if not math.isfinite(v)]
    if bad:
        words = origin(model, torch.arange(2, PROBE + 2)[None])
        raise NotFinite(f"{stage}: {bad[0]} is {numbers[bad[0]]}: {words}{HINT}")


def watched(criterion: Component | None) -> Component | None:
    """The criterion, whose scores must be numbers. Raises NotFinite naming the group."""
    if criterion is None:
        return None
    score = criterion.entry.fn

    def checked(model: nn.Module, groups: list[Group], run: Run, **options: Any) -> Scores:
        scores: Scores = score(model, groups, run, **options)
        for name, values in scores.items():
            if bool(values.isnan().any()):
                found = origin(model, run.tokens)
                raise NotFinite(f"score: the scores of {name} are not numbers: {found}{HINT}")
        return scores

    return replace(criterion, entry=replace(criterion.entry, fn=checked))


@torch.no_grad()
def origin(model: nn.Module, tokens: Tensor) -> str:
    """In words: the first layer whose output on the first sample is not finite."""
    found: list[str] = []
    hooks = []
    for name, module in model.named_modules():
        if not any(module.children()):
            hooks.append(module.register_forward_hook(_note(name, found)))
    try:
        forward(model, tokens[:1])
    finally:
        for hook in hooks:
            hook.remove()
    if found:
        return f"the first output that is not finite is that of {found[0]}"
    return "every layer's output on the first sample is finite"


def _note(name: str, found: list[str]) -> Any:
    def hook(module: nn.Module, args: Any, out: Any) -> None:
        tensors = [t for t in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(t)]
        if not found and any(t.is_floating_point() and not t.isfinite().all() for t in tensors):
            found.append(name)

    return hook
