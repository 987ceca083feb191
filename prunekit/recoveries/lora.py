"""LoRA (Hu et al., arXiv 2106.09685) as LLM-Pruner recovers with it (arXiv 2305.11627, README
recipe), merged at the end.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from prunekit import graph
from prunekit.architecture.blocks import linear_names
from prunekit.data.files import DataRoot, TextFile
from prunekit.data.kept_prompt import with_prompt
from prunekit.data.training_examples import (
    Corpus,
    check_source,
    check_training_text,
    load_examples,
    split_validation,
)
from prunekit.problem import Problem
from prunekit.registry import (
    Above,
    LearningRate,
    Length,
    Natural,
    Positive,
    Seed,
    Share,
    recoveries,
)
from prunekit.training.low_rank import Updates, check_updates, train_and_merge
from prunekit.training.recipe import Recipe, check_patience, micro_batches
from prunekit.types import Pruned


def check_lora(
    model: nn.Module,
    *,
    dataset: Corpus,
    split: str | None,
    path: str | None,
    targets: list[str] | None,
    validation_size: int,
    batch: int,
    micro_batch: int,
    patience: int | None,
    **_: Any,
) -> None:
    """Raises ConfigError for options of `lora` that cannot be, as far as the shapes of `model`
    decide (on any device, meta included); no data is read.
    """
    check_updates(model, linear_names(model, targets))
    micro_batches(batch, micro_batch)
    check_patience(patience, validation_size)
    check_source(dataset, split, path)


@recoveries.register(
    paper="arXiv 2106.09685",
    year=2021,
    needs="data",
    out="self-contained",
    check=check_lora,
    tokenized=check_training_text,
    context=("max_length",),
)
def lora(
    problem: Problem,
    pruned: Pruned,
    *,
    dataset: Corpus = "alpaca",
    split: str | None = None,
    path: TextFile | None = None,
    data_root: DataRoot = None,
    max_length: Length = 256,
    validation_size: Natural = 2000,
    r: Positive = 8,
    alpha: Positive = 16,
    dropout: Share = 0.05,
    targets: list[str] | None = None,
    lr: LearningRate = 1e-4,
    warmup_steps: Natural = 100,
    epochs: Above = 2,
    max_steps: Positive | None = None,
    batch: Positive = 64,
    micro_batch: Positive = 4,
    eval_every: Positive = 100,
    log_every: Positive = 10,
    save_every: Positive = 100,
    patience: Positive | None = None,
    seed: Seed = 42,
) -> nn.Module:
    """Low-rank updates of all linear layers, trained on instructions or plain text and merged into
    the weights.

    Args:
        validation_size: examples set aside; the updates with the lowest loss on them are merged,
            with 0 those of the last step.
        r: rank of the updates.
        alpha: the updates are `alpha / r * B A`.
        targets: names or patterns of linear layers in the decoder's blocks (`q_proj`, `mlp.*`);
            null is all.
        patience: looks in a row at the validation without a lower loss that end the training.

    What pruning set to zero is zero afterwards: updates of rows and columns that are zero as a
    whole are not trained there; what an update writes to other zeros (single weights) is lost in
    the merge. Leaves `recovery_curve` (step, loss, learning_rate, grad_norm, eval_loss),
    `recovery_best_step`, `recovery_examples` and `recovery_trained_params` in `pruned.notes`.
    Raises ConfigError for targets that match nothing or data that holds nothing.
    """
    model = pruned.model
    updates = Updates(linear_names(model, targets), r, alpha, dropout)
    recipe = Recipe(
        lr=lr,
        warmup_steps=warmup_steps,
        epochs=epochs,
        max_steps=max_steps,
        batch=batch,
        micro_batch=micro_batch,
        eval_every=eval_every,
        log_every=log_every,
        save_every=save_every,
        progress=problem.training,
        patience=patience,
        seed=seed,
    )
    micro_batches(batch, micro_batch)  # said before the data is read
    check_patience(patience, validation_size)
    examples = load_examples(problem.tokenizer, dataset, split, path, data_root, max_length)
    examples = with_prompt(examples, model, problem.tokenizer)
    examples, validation = split_validation(examples, validation_size, seed)
    keep = graph.zero_masks(model, pruned.groups, pruned.kept)
    history, trained = train_and_merge(model, updates, examples, validation, recipe, keep)
    pruned.notes |= history.notes(len(examples), trained)
    return model
