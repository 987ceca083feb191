"""A little training on the calibration text, while a model is still being pruned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from prunekit.data.training_examples import all_learnt
from prunekit.training.low_rank import Updates, train_and_merge
from prunekit.training.recipe import Recipe


def correct(
    model: nn.Module,
    tokens: Tensor,
    names: Sequence[str],
    keep: Mapping[str, Tensor],
    steps: int,
    lr: float,
) -> None:
    """Low-rank updates of the linear modules `names`, rank 8, trained for `steps` steps of 8
    samples of `tokens (N, T)` and merged; what `keep` says is zero stays so (LLM Surgeon, van der
    Ouderaa et al., arXiv 2312.17244, section 3.6).
    """
    examples = [all_learnt(row) for row in tokens.tolist()]
    recipe = Recipe(lr=lr, max_steps=steps, batch=min(8, len(examples)))
    train_and_merge(model, Updates(names, r=8, alpha=16, dropout=0.0), examples, (), recipe, keep)
