"""The run over the whole model: pushes calibration tokens through it and yields what comes out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


class WholeRun:
    """`for out in run():` forwards under the caller's grad mode.

    `tokens` is (N, T). `labels=True` makes outputs carry `.loss`, the mean over the batch's shifted tokens.
    `batch` is the number of samples a forward takes; None takes all N at once, as LLM-Pruner does.
    """

    def __init__(self, model: nn.Module, tokens: Tensor):
        self.model = model
        self.tokens = tokens

    def __call__(self, labels: bool = False, batch: int | None = None) -> Iterator[Any]:
        device = self.model.get_input_embeddings().weight.device  # type: ignore[operator]
        for x in self.tokens.split(batch or len(self.tokens)):
            ids = x.to(device)
            yield self.model(input_ids=ids, use_cache=False, **({"labels": ids} if labels else {}))
