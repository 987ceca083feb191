"""Multiply-accumulates of one forward pass."""

from __future__ import annotations

from typing import Any

from torch import nn

from prunekit.architecture.macs import flop_counter_macs, macs
from prunekit.registry import Positive, evals


@evals.register("macs", context=("tokens",))
def macs_eval(
    model: nn.Module, tokenizer: Any, *, tokens: Positive = 64, cross_check: bool = True
) -> dict[str, float]:
    """Multiply-accumulates of one forward pass over `tokens` ids: by the paper's formulas, and as
    torch's FLOP counter sees it.

    `macs_flop_counter` is half the FLOPs of the matrix products that ran; rotary embedding, norms,
    softmax and activations, which the formulas count, are not in it, so it lies slightly below.
    `cross_check=false` leaves it out (it runs the model once), and so does the meta device, where
    nothing can run.
    """
    out = {"macs": float(macs(model, tokens))}
    if cross_check and not any(p.is_meta for p in model.parameters()):
        out["macs_flop_counter"] = flop_counter_macs(model, tokens)
    return out
