"""The run over the whole model: pushes calibration tokens through it, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.types import Counts, Run

FORWARD_TOKENS = 4096
"""Tokens a forward takes where nothing depends on the batch."""


def samples_at_once(tokens: Tensor, count: int = FORWARD_TOKENS) -> int:
    """Samples of `tokens (N, T)` that make up about `count` tokens, at least one."""
    return max(1, count // tokens.shape[1])


def forward(model: nn.Module, ids: Tensor, *, head: bool = True, labels: bool = False) -> Any:
    """The outputs of one forward of `ids (n, T)` without a cache.

    Args:
        head: false stops before the output matrix, for callers that only watch what happens inside.
        labels: outputs carry `.loss`, the mean over the shifted tokens. What a config adds to it
            for a router (`output_router_logits`) is left out: it depends on the batch.
    """
    ids = ids.to(model.get_input_embeddings().weight.device)  # type: ignore[operator]
    body = model if head else getattr(model, "base_model", model)
    more: dict[str, Any] = {"labels": ids} if labels else {}
    if labels and adds_router_loss(model):
        more["output_router_logits"] = False
    return body(input_ids=ids, use_cache=False, **more)


def adds_router_loss(model: nn.Module) -> bool:
    """Whether the config has the model add its routers' balance to the loss."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return bool(getattr(config, "output_router_logits", False))


class ModelRun:
    """A `Run` over the whole model, under the caller's grad mode.

    `counts` says how many units are about to go; None for a criterion that is not registered with
    `uses_counts=True`, whose scores hold for every ratio. A run is made anew when the model
    changes, so that `statistics` hold for the model as it is.
    """

    def __init__(self, model: nn.Module, tokens: Tensor, counts: Counts | None = None):
        self.model, self.tokens = model, tokens
        self.statistics: dict[Any, Any] = {}
        self._counts = counts

    @property
    def counts(self) -> Counts:
        """Raises RuntimeError where the criterion's registration does not say that it asks."""
        if self._counts is None:
            raise RuntimeError("a criterion that reads run.counts is registered uses_counts=True")
        return self._counts

    def part(self, number: int, of: int) -> ModelRun:
        """A run over one of `of` parts of the samples."""
        return ModelRun(self.model, self.tokens.tensor_split(of)[number], self._counts)

    def once(self, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `compute` gives: there are no blocks of which some could be done already."""
        return compute()

    def forward(self) -> Iterator[int]:
        for ids in self.tokens.split(samples_at_once(self.tokens)):
            forward(self.model, ids, head=False)
            yield len(ids)

    def losses(self, batch: int | None = None) -> Iterator[Any]:
        for ids in self.tokens.split(batch or len(self.tokens)):
            yield forward(self.model, ids, labels=True)


def mean_loss(run: Run, batch: int | None = None) -> Tensor:
    """Over all samples, on the device; `batch` samples at a time, or as many as make up
    `FORWARD_TOKENS`.
    """
    at_once = batch or samples_at_once(run.tokens)
    rows = zip(run.tokens.split(at_once), run.losses(at_once), strict=True)
    parts = [out.loss.float() * (len(ids) / len(run.tokens)) for ids, out in rows]
    return torch.stack(parts).sum()
