"""One block at a time, trained to put out what the dense model's block does (PERP, Zimmer et al.,
arXiv 2312.15230, section 3.3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

Forward = Callable[[int], Tensor]
"""`forward(batch)`: what the block puts out for a batch of its inputs, as it is now."""


def relative_error(forward: Forward, targets: Sequence[Tensor]) -> float:
    """`||out - target||^2 / ||target||^2` over all batches."""
    with torch.no_grad():
        off = sum(
            float((forward(i).float() - y.float()).square().sum()) for i, y in enumerate(targets)
        )
    return off / sum(float(y.float().square().sum()) for y in targets)


def reconstruct(
    parameters: Iterable[nn.Parameter],
    forward: Forward,
    targets: Sequence[Tensor],
    steps: int,
    lr: float,
    generator: torch.Generator,
) -> tuple[float, float]:
    """Trains `parameters` by Adam, the rate falling to zero, so that `forward(i)` comes to
    `targets[i]`; they are as they were where it comes no closer. Returns the relative errors
    before and after.
    """
    trained = list(parameters)
    at_first = [p.detach().clone() for p in trained]
    before = relative_error(forward, targets)
    optimizer = torch.optim.Adam(trained, lr=lr)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        i = int(torch.randint(len(targets), (), generator=generator))
        with torch.enable_grad():
            target = targets[i].float()
            loss = (forward(i).float() - target).square().sum() / target.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    after = relative_error(forward, targets)
    if not after < before:
        with torch.no_grad():
            for parameter, first in zip(trained, at_first, strict=True):
                parameter.copy_(first)
        return before, before
    return before, after
