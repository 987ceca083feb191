"""Calibration text spread over processes (torchrun): each sees a part of the samples, and sums over
tokens are added up, so that all of them choose the same.

What is not written for it sees the whole text in every process, and chooses the same too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from prunekit.errors import ConfigError
from prunekit.types import Run

Item = TypeVar("Item")


def count() -> int:
    """Processes that share the text: one unless `distributed` was initialised."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size()


def check_samples(tokens: Tensor) -> None:
    """Raises ConfigError for fewer samples than processes."""
    if len(tokens) < count():
        raise ConfigError(
            f"{count()} processes share {len(tokens)} calibration samples: give calib.samples="
            f"{count()} or more"
        )


def own_part(run: Run) -> Run:
    """The run over this process's samples; all of them where there is one process."""
    if count() == 1:
        return run
    check_samples(run.tokens)
    return run.part(distributed.get_rank(), count())


def own(items: Sequence[Item]) -> Sequence[Item]:
    """Those of this process."""
    return items if count() == 1 else items[distributed.get_rank() :: count()]


def add_up(tensors: Iterable[Tensor], largest: bool = False) -> None:
    """Every tensor becomes the sum (or the largest) over the processes, in place; the same bits in
    all of them.
    """
    if count() > 1:
        how: Any = distributed.ReduceOp.MAX if largest else distributed.ReduceOp.SUM
        with torch.no_grad():
            for tensor in tensors:
                distributed.all_reduce(tensor, how)
