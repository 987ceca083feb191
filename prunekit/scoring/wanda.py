"""Wanda scores of single weights, and input norms (Sun et al., ICLR 2024, arXiv 2306.11695)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from prunekit.activations.moments import Moments, moments
from prunekit.architecture.matrices import module_name
from prunekit.types import Group, Run


def input_norms(model: nn.Module, groups: Iterable[Group], run: Run) -> dict[str, Tensor]:
    """Group name -> (inputs,) `||X_j||_2` over all calibration tokens that enter the module, and
    the others that use its matrix; zero where none does (an idle expert).
    """
    groups = list(groups)
    found = module_norms(model, dict.fromkeys(module_name(g) for g in groups), run)
    return {g.name: found[module_name(g)] for g in groups}


@torch.no_grad()
def module_norms(model: nn.Module, names: Iterable[str], run: Run) -> dict[str, Tensor]:
    """The same by the names of linear modules."""
    found = moments(model, names, run)
    return {name: (x.square * x.count).sqrt() for name, x in found.items()}


@torch.no_grad()
def read_sizes(weight: Tensor, seen: Moments) -> Tensor:
    """(in,) mean size of the weights that read a channel, `weight (out, in)`, times the channel's
    root mean square: the structured Wanda that FLAP compares with, before units are formed.
    """
    return weight.float().abs().mean(0) * seen.square.sqrt().to(weight.device)


def wanda_score(weight: Tensor, norms: Tensor) -> Tensor:
    """`|W_ij| * ||X_j||_2` for `weight (outputs, inputs)` and `norms (inputs)`."""
    return weight.float().abs() * norms.to(weight.device)
