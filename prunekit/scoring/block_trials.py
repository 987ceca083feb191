"""What a text costs a model in which something in one block is tried, without running again what
comes before that block.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from prunekit.activations.runs import forward
from prunekit.errors import ConfigError
from prunekit.scoring.block_ablation import entering, returning, siblings

Metric = Literal["loss", "accuracy"]
"""The mean loss of the next token, or one minus the share of next tokens that rank first."""


Entered = tuple[Tensor, tuple[Any, ...] | None]
"""What enters a block, and what follows the activation that it returns."""


class TrialOptions(NamedTuple):
    """How a trial is measured.

    Attributes:
        metric: what it costs.
        batch: samples a forward.
        reuse: hold what enters the block; False runs the whole model for every trial, for one whose
            blocks hand each other more than the residual stream.
    """

    metric: Metric = "loss"
    batch: int = 8
    reuse: bool = True


@torch.no_grad()
def text_cost(model: nn.Module, tokens: Tensor, options: TrialOptions) -> float:
    """The cost of `tokens (N, T)`; lower is better."""
    parts = tokens.split(options.batch)
    total = sum(_cost(model, ids, options.metric).double() * len(ids) for ids in parts)
    return float(total) / len(tokens)


def _cost(model: nn.Module, ids: Tensor, metric: Metric) -> Tensor:
    """() mean over the samples and their predicted tokens."""
    out = forward(model, ids, labels=True)
    if metric == "loss":
        loss: Tensor = out.loss
        return loss
    first = out.logits[:, :-1].argmax(-1)
    wrong: Tensor = first != ids[:, 1:].to(first.device)
    return wrong.float().mean()


class BlockTrials:
    """`tokens (N, T)` as they enter one block of the model as it is: what comes before the block
    must stay as it is.

    Raises ConfigError where that is not all that the block is given, and `reuse` was asked for.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, block: str, tokens: Tensor, options: TrialOptions) -> None:
        self.model, self.tokens, self.options = model, tokens, options
        blocks, place = siblings(model, block)
        self.before = blocks[:place] if options.reuse else []
        self.entered: list[Entered] = []
        if not self.before:
            return
        self.check(block)
        self.entered = [self.entering(block, ids) for ids in tokens.split(options.batch)]

    def entering(self, block: str, ids: Tensor) -> Entered:
        entered, rests = entering(self.model, [block], ids)
        return entered[block], rests[block]

    def check(self, block: str) -> None:
        """One sample's loss tells whether the residual stream is all that the blocks hand each
        other; how often a token ranks first may not, on so little text.
        """
        ids = self.tokens[:1]
        part = float(self._cost(self.entering(block, ids), ids, "loss"))
        whole = float(_cost(self.model, ids, "loss"))
        if not math.isclose(whole, part, rel_tol=1e-3, abs_tol=1e-6):
            raise ConfigError(
                f"{type(self.model).__name__}'s blocks hand each other more than the residual "
                f"stream (loss {whole:.6g}, from {block} on {part:.6g}): give pruner.reuse=false"
            )

    @torch.no_grad()
    def cost(self) -> float:
        """Of the text, with the block and those after it as they are now."""
        if not self.before:
            return text_cost(self.model, self.tokens, self.options)
        metric, parts = self.options.metric, self.tokens.split(self.options.batch)
        rows = zip(self.entered, parts, strict=True)
        total = sum(self._cost(entered, ids, metric).double() * len(ids) for entered, ids in rows)
        return float(total) / len(self.tokens)

    def _cost(self, entered: Entered, ids: Tensor, metric: Metric) -> Tensor:
        with ExitStack() as stack:
            for b in self.before:
                stack.enter_context(returning(b, *entered))
            return _cost(self.model, ids, metric)
