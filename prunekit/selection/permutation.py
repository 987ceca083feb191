"""The order of a matrix's input channels in which N:M keeps the most score (Zhang et al., ICLR
2024, "Plug-and-Play"). Tensors in, tensors out.

Scores are `(outputs, inputs)`; an order is `(inputs,)`, the channels in the order in which they
shall stand: `scores[:, order]`. Runs of `block_m` channels compete; `keep` of them stay.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def kept_score(scores: Tensor, order: Tensor, keep: int, block_m: int) -> float:
    """Sum of the scores that stay when the channels stand in this order."""
    runs = scores[:, order].view(len(scores), -1, block_m)
    return float(runs.topk(keep, dim=2).values.sum(dtype=torch.float64))


def deal(strength: Tensor, block_m: int) -> Tensor:
    """Channels dealt to the runs like cards, weakest first, every second round backwards, so that
    strong and weak ones meet.

    `strength (inputs)` ranks them: the paper's column sums of the scores, or whatever else.
    """
    rounds = strength.argsort(stable=True).view(block_m, -1).clone()
    rounds[1::2] = rounds[1::2].flip(1)
    return rounds.T.reshape(-1)


def assign(
    scores: Tensor,
    order: Tensor,
    keep: int,
    block_m: int,
    *,
    parts: int = 1,
    passes: int = 1,
) -> Tensor:
    """An order that keeps at least as much as `order`: place after place of the runs, the channels
    that stand there are dealt anew, the best way there is while the others stay.

    With the other channels of run g fixed, let t_g be the `keep`-th highest score among them, row
    by row. A channel c in its free place keeps what the others keep there and `max(t_g, s_c)` in
    place of t_g, so the best assignment maximises `sum |t_g - s_c|`, up to terms of g or c alone.

    parts: the runs are cut into so many parts, and channels stay in theirs; the time of an
        assignment grows with the cube of the runs.
    passes: how often to go through all places; no more once a pass moves nothing. The paper's is 1.
    """
    scores = scores.float()
    places = order.view(-1, block_m).clone()
    limits = [len(places) * p // parts for p in range(parts + 1)]
    for _ in range(passes):
        before = places.clone()
        for start, stop in pairwise(limits):
            part = places[start:stop]
            for place in range(block_m):
                part[:, place] = part[_best(scores, part, place, keep), place]
        if torch.equal(before, places):
            break
    return places.reshape(-1)


def _best(scores: Tensor, places: Tensor, place: int, keep: int) -> Tensor:
    """From which run each run takes the channel for this place."""
    others = torch.cat([places[:, :place], places[:, place + 1 :]], 1)
    threshold = scores[:, others].topk(keep, dim=2).values[..., -1]
    gain = torch.cdist(threshold.T, scores[:, places[:, place]].T, p=1)
    _, chosen = linear_sum_assignment(gain.cpu().numpy(), maximize=True)
    return torch.from_numpy(chosen).to(places.device)


def permutation(
    scores: Tensor, keep: int, block_m: int, *, parts: int = 1, passes: int = 1
) -> Tensor:
    """The best of three orders: as the channels stand, dealt by their sums, and assigned from
    there; the earlier one where two keep the same.
    """
    identity = torch.arange(scores.shape[1], device=scores.device)
    dealt = deal(scores.float().sum(0), block_m)
    assigned = assign(scores, dealt, keep, block_m, parts=parts, passes=passes)
    return max(
        (identity, dealt, assigned), key=lambda order: kept_score(scores, order, keep, block_m)
    )
