"""The run over the whole model: pushes calibration tokens through it and yields what comes out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from prunekit.types import Counts


class WholeRun:
    """`for out in run():` forwards under the caller's grad mode.

    `tokens` is (N, T). `labels=True` makes outputs carry `.loss`, the mean over the batch's shifted
    tokens. `batch` is the number of samples a forward takes; None takes all N at once, as
    LLM-Pruner does. `head=False` stops before the output matrix, for callers that only watch what
    happens inside. `counts` says how many units are about to go, for the few criteria whose choice
    depends on it. `seen` holds statistics that were taken on this run, so that a second reader of
    the same ones needs no second pass; a run is made anew when the model changes.
    """

    def __init__(self, model: nn.Module, tokens: Tensor, counts: Counts | None = None):
        self.model = model
        self.tokens = tokens
        self.counts = counts or {}
        self.seen: dict[Any, Any] = {}

    def __call__(
        self, labels: bool = False, batch: int | None = None, head: bool = True
    ) -> Iterator[Any]:
        device = self.model.get_input_embeddings().weight.device  # type: ignore[operator]
        model = self.model if head else getattr(self.model, "base_model", self.model)
        for x in self.tokens.split(batch or len(self.tokens)):
            ids = x.to(device)
            yield model(input_ids=ids, use_cache=False, **({"labels": ids} if labels else {}))

    def split(self, batch: int) -> Iterator[WholeRun]:
        """Runs over `batch` samples each, for callers that need several passes over the same few
        samples.
        """
        for x in self.tokens.split(batch):
            yield WholeRun(self.model, x, self.counts)
