"""Taylor importance of coupled structures (LLM-Pruner, NeurIPS 2023, arXiv 2305.11627, equations 3
to 5).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from prunekit.activations.storage import Store
from prunekit.architecture.blocks import block_modules
from prunekit.registry import Positive, criteria
from prunekit.scoring.aggregate import Reduce, channel_sum, scored, unit_scores
from prunekit.scoring.block_gradients import gradients
from prunekit.scoring.lean_backward import lean_activations, lean_loss
from prunekit.types import STRUCTURES, Group, Run, Scores, tensor_of

Mode = Literal["vectorize", "param_first", "param_second", "param_mix"]
CHUNK, CHUNK_ON_CPU = 2**24, 2**18
"""Elements folded at a time: on a CPU a MiB of float32, which stays in cache between the operations
on it.
"""


@criteria.register(paper="arXiv 2305.11627", year=2023, needs="gradients", kinds=STRUCTURES)
def taylor(
    model: nn.Module,
    groups: list[Group],
    run: Run,
    *,
    mode: Mode = "param_first",
    reduce: Reduce = "sum",
    batch: Positive | None = None,
    by_block: bool | None = None,
    store: Store = "memory",
) -> Scores:
    """Change of the loss when a unit goes, to first or second order, from gradients on the
    calibration text.

    Per weight w with batch gradient g and mean squared per-sample gradient F: `vectorize` |sum w g|
    over a channel, `param_first` sum |w g|, `param_second` sum w F w, `param_mix` sum |w g - w F w
    / 2|. Channels are reduced over a group's members by `reduce`, then summed over a unit.
    Gradients are folded as backward produces them. `batch` samples go at a time (default: what
    makes up 2,048 tokens); more batches than one take as much memory again as the weights in
    question, and no score depends on it.

    `by_block` differentiates one block at a time, with the memory of one (default: where
    `model.weights=disk`); what the blocks read waits in `store`.
    """
    axes: dict[str, set[int]] = defaultdict(set)
    for g in groups:
        for m in scored(g):
            axes[m.param].add(m.axis)
    per_channel: dict[tuple[str, int], Tensor] = {}

    def fold(name: str, weight: Tensor, gradient: Tensor, mean_squared: Tensor | None) -> None:
        found = channel_importance(weight, gradient, mean_squared, mode, axes[name])
        per_channel.update({(name, axis): values for axis, values in found.items()})

    trained = {n for n, _ in model.named_parameters()}
    names = [n for n in axes if n in trained]
    with lean_activations(block_modules(model)), lean_loss(model):
        second = mode in ("param_second", "param_mix")
        gradients(
            model, names, run, fold, squares=second, batch=batch, by_block=by_block, store=store
        )
    for name in axes.keys() - trained:  # buffers have no gradient
        shape = tensor_of(model, name).shape
        per_channel.update({(name, axis): torch.zeros(shape[axis]) for axis in axes[name]})
    return {g.name: unit_scores(g, per_channel, reduce) for g in groups}


def channel_importance(
    w: Tensor, g: Tensor, squares: Tensor | None, mode: Mode, axes: Iterable[int]
) -> dict[int, Tensor]:
    """By axis in `axes` of the weight `w` the importance of each index, float32 on `w`'s device; of
    a vector that of each element.

    A stretch of rows at a time, in one buffer that stays in the processor's cache: a fold costs
    little more than reading `w` and `g`.
    """
    shape = w.shape
    matrix = (shape[0], -1) if w.dim() < 3 else shape  # a vector is a matrix of one column
    w, g = w.reshape(matrix), g.reshape(matrix)
    chunk = CHUNK_ON_CPU if w.device.type == "cpu" else CHUNK
    rows = min(len(w), max(1, chunk // max(1, w[0].numel())))
    sums = {a: torch.zeros(shape[a], dtype=torch.float32, device=w.device) for a in axes}
    buffer = torch.empty((rows, *w.shape[1:]), dtype=torch.float32, device=w.device)
    across, down = buffer.new_ones(w.shape[-1]), buffer.new_ones(rows)
    parts = zip(
        w.split(rows),
        g.split(rows),
        [None] * len(w) if squares is None else squares.reshape(matrix).split(rows),
    )
    for i, (w_part, g_part, f_part) in enumerate(parts):
        s = buffer[: len(w_part)]
        element_importance(s, w_part, g_part, f_part, mode)
        for a, total in sums.items():
            if s.dim() > 2:  # fused experts
                where = slice(i * rows, i * rows + len(s)) if a == 0 else slice(None)
                total[where] += channel_sum(s, a)
            # Products with ones: several times faster than sum() along the first dimension.
            elif a == 0:
                torch.mv(s, across, out=total[i * rows : i * rows + len(s)])
            else:
                total.addmv_(s.T, down[: len(s)])
    return {a: total.abs_() for a, total in sums.items()}


def element_importance(
    out: Tensor, w: Tensor, g: Tensor, squares: Tensor | None, mode: Mode
) -> None:
    """Writes the importance of each weight to `out`: signed for `vectorize`, whose absolute value
    is taken of a channel's sum, else non-negative.
    """
    out.copy_(w)
    if mode in ("vectorize", "param_first"):
        out.mul_(g)
        if mode == "param_first":
            out.abs_()
        return
    assert squares is not None
    if mode == "param_second":
        out.square_().mul_(squares)
    else:
        torch.sub(w.float() * g, 0.5 * out.square_().mul_(squares), out=out).abs_()
