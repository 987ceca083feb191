"""Taylor importance of coupled structures (LLM-Pruner, NeurIPS 2023, arXiv 2305.11627, equations 3 to 5)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from prunekit.fold import Reduce, channel_sum, scored, unit_scores
from prunekit.gradients import backward, lean_activations, lean_loss
from prunekit.registry import Positive, criteria
from prunekit.types import STRUCTURES, Group, Run, Scores, block_modules

Mode = Literal["vectorize", "param_first", "param_second", "param_mix"]
_CHUNK = 2**21
"""Elements folded at a time: the float32 temporaries of one fold stay at some 10 MiB."""


@criteria.register(paper="arXiv 2305.11627", year=2023, needs="gradients", kinds=STRUCTURES)
def taylor(
    model: nn.Module,
    groups: list[Group],
    run: Run,
    *,
    mode: Mode = "param_first",
    reduce: Reduce = "sum",
    batch: Positive | None = None,
) -> Scores:
    """Change of the loss when a unit goes, to first or second order, from gradients on the calibration text.

    Per weight w with batch gradient g and mean squared per-sample gradient F: `vectorize` |sum w g| over a channel, `param_first`
    sum |w g|, `param_second` sum w F w, `param_mix` sum |w g - w F w / 2|. Channels are reduced over a group's members by `reduce`, then
    summed over a unit. Gradients are folded as backward produces them. `batch` splits the calibration samples (default: all at once).
    """
    axes: dict[str, list[int]] = {}
    for g in groups:
        for m in scored(g):
            if m.axis not in axes.setdefault(m.param, []):
                axes[m.param].append(m.axis)
    per_channel: dict[tuple[str, int], Tensor] = {}

    def fold(name: str, weight: Tensor, gradient: Tensor, mean_squared: Tensor | None) -> None:
        for axis, values in channel_importance(weight, gradient, mean_squared, mode, axes[name]).items():
            per_channel[name, axis] = values

    trained = {n for n, _ in model.named_parameters()}
    names = [n for n in axes if n in trained]  # buffers have no gradient
    with lean_activations(block_modules(model)), lean_loss(model):
        backward(model, names, run, fold, squares=mode in ("param_second", "param_mix"), batch=batch)
    for name, used in axes.items():
        if name not in trained:
            for axis in used:
                per_channel[name, axis] = torch.zeros(dict(model.named_buffers())[name].shape[axis])
    return {g.name: unit_scores(g, per_channel, reduce) for g in groups}


def channel_importance(w: Tensor, g: Tensor, squares: Tensor | None, mode: Mode, axes: Iterable[int]) -> dict[int, Tensor]:
    """Importance of each index of each axis in `axes` of weight `w`, in float32 on `w`'s device. Norm weights (1-D): per element."""
    rows = max(1, _CHUNK // max(1, w[0].numel()))
    sums: dict[int, Tensor] = {a: torch.zeros(w.shape[a], dtype=torch.float32, device=w.device) for a in axes}
    for start in range(0, w.shape[0], rows):
        part = slice(start, start + rows)
        s = element_importance(w[part].float(), g[part].float(), None if squares is None else squares[part], mode)
        for a, total in sums.items():
            if a == 0:
                total[part] = channel_sum(s, 0)
            else:
                total += channel_sum(s, a)
    return {a: total.abs() for a, total in sums.items()}


def element_importance(w: Tensor, g: Tensor, squares: Tensor | None, mode: Mode) -> Tensor:
    """Signed for `vectorize` (the sum over a channel is taken before the absolute value), else non-negative."""
    if mode == "vectorize":
        return w * g
    if mode == "param_first":
        return (w * g).abs()
    assert squares is not None
    second = w * squares * w
    return second if mode == "param_second" else (w * g - 0.5 * second).abs()
