"""The sample that models are tried on, what they return for it, and what may go wrong."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    AttributeError,
    AssertionError,
    ZeroDivisionError,
)
"""What a model's own code raises when a size that it keeps in Python does not fit."""
TOKENS = 13
"""Length of the traced sample: a prime, so that few sizes of a model equal it."""
PROMPT = 8
"""How much of it a generated text starts from."""


def inputs_for(model: nn.Module, tokens: int = TOKENS) -> dict[str, Tensor]:
    """One short sample of token ids that every vocabulary has."""
    rows = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    top = min(max(rows, default=64), 100)
    accepted = list(inspect.signature(model.forward).parameters)
    name = "input_ids" if "input_ids" in accepted or not accepted else accepted[0]
    return {name: torch.arange(tokens)[None] * 7 % max(top - 8, 1) + 8 % top}


def logits_of(output: Any) -> Tensor:
    """The logits, whatever a model wraps them in."""
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "logits"):
        logits: Tensor = output.logits
        return logits
    if isinstance(output, (tuple, list)):
        return next(o for o in output if isinstance(o, Tensor) and o.dim() >= 2)
    raise TypeError(f"the model returned {type(output).__name__}, which holds no logits")
