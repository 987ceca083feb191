"""What a pruner works on, written in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.problem import CALIBRATION, Problem
from prunekit.registry import REGISTRIES, Component
from prunekit.types import Pruned

Part = dict[str, Any] | Component | Callable[..., Any]
"""A component: a node as in a configuration, built already, or any function of its signature."""


def problem(
    model: nn.Module,
    tokens: Tensor | None = None,
    *,
    criterion: Part | None = None,
    ratio: Part | None = None,
    exclude: Part | None = None,
) -> Problem:
    """`model` with the calibration text `tokens (N, T)`; None where only shapes are known."""
    more = {} if exclude is None else {"exclude": part("exclude", exclude)}
    return Problem(
        model,
        token_sets={} if tokens is None else {CALIBRATION: tokens},
        criterion=part("criterion", criterion),
        ratio=part("ratio", ratio),
        **more,
    )


def part(kind: str, node: Part | None) -> Any:
    """The component of that kind that a node names; anything else as it is."""
    return REGISTRIES[kind].build(node) if isinstance(node, dict) else node


def uniform(target: float, of: str = "units", **options: Any) -> dict[str, Any]:
    """The node of ratio=uniform."""
    return {"name": "uniform", "target": target, "of": of, **options}


def check(pruner: str, of: Problem, **options: Any) -> Any:
    """What the pruner's own check tells about a problem."""
    built = REGISTRIES["pruner"].build({"name": pruner, **options})
    return built.meta["check"](of, **built.options)


def half_of_the_weights(model: nn.Module) -> Pruned:
    """What is left of a model when the smaller half of each of its matrices is set to zero."""
    asked = problem(
        model,
        torch.randint(8, 100, (4, 16)),
        criterion={"name": "weight_magnitude"},
        ratio=uniform(0.5, "prunable"),
    )
    done: Pruned = part("pruner", {"name": "unstructured", "schedule": "whole"})(asked)
    return done
