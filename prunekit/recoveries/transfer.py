"""What small weights are for: a sparse model learns a task with its zeros kept, with the small
weights back but held still, or with everything free (Yin et al., 2023, arXiv 2310.02277).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prunekit import graph
from prunekit.checkpoint.remote_code.runtime_modules import describe_modules
from prunekit.data.files import DataRoot, TextFile
from prunekit.data.kept_prompt import with_prompt
from prunekit.data.training_examples import (
    Corpus,
    check_source,
    check_training_text,
    load_examples,
)
from prunekit.errors import ConfigError
from prunekit.problem import Problem
from prunekit.registry import Above, LearningRate, Length, Natural, Positive, Seed, recoveries
from prunekit.training.recipe import Recipe, micro_batches
from prunekit.training.weights import train_weights
from prunekit.training.zeros import held
from prunekit.types import Pruned

Arm = Literal["sparse", "frozen", "dense"]
ALIKE = 0.25
"""Cosine with the dense model's of weights that are still in their places, at least: pruners that
change what stays leave it near 1, and in another order it is near 0.
"""


def check_transfer(
    _: nn.Module,
    *,
    dataset: Corpus,
    split: str | None,
    path: str | None,
    batch: int,
    micro_batch: int,
    **__: Any,
) -> None:
    """Raises ConfigError for a text that is not named, and batches that cannot be."""
    check_source(dataset, split, path)
    micro_batches(batch, micro_batch)


@recoveries.register(
    paper="arXiv 2310.02277, 2306.03805",
    year=2023,
    needs="data",
    dense=True,
    out="self-contained",
    check=check_transfer,
    tokenized=check_training_text,
    context=("max_length",),
)
def transfer(
    problem: Problem,
    pruned: Pruned,
    *,
    arm: Arm = "sparse",
    dataset: Corpus = "alpaca",
    split: str | None = None,
    path: TextFile | None = None,
    data_root: DataRoot = None,
    examples: Positive | None = None,
    max_length: Length = 256,
    lr: LearningRate = 2e-5,
    warmup_steps: Natural = 0,
    epochs: Above = 3,
    max_steps: Positive | None = None,
    batch: Positive = 16,
    micro_batch: Positive = 4,
    log_every: Positive = 10,
    save_every: Positive = 100,
    seed: Seed = 42,
) -> nn.Module:
    """Trains all weights on a text by cross entropy, in one of Junk DNA's three arms.

    `sparse` keeps every zero (Essential Sparsity's fine-tuning under the mask). `frozen` gives what
    was removed its dense values back and holds them still, so that only the large weights learn.
    `dense` starts with the zeros and trains everything. The last two leave a model of which nothing
    is removed. The last step's weights are kept. A model in half precision is trained in float32
    and comes back in its own.

    Args:
        arm: sparse, frozen or dense.
        examples: the first so many examples of the text; null takes all.
        max_length: tokens of an example at most; plain text has exactly so many.

    Raises ConfigError where units were cut out, so that there are no zeros to speak of, for data
    that holds nothing, and in the `frozen` arm for weights that stand elsewhere than in the dense
    model.
    """
    model = pruned.model
    keep = graph.zero_masks(model, pruned.groups, pruned.kept)
    whole = all(bool(mask.all()) for mask in pruned.kept.values())
    if not keep and (not whole or describe_modules(model)):
        raise ConfigError(
            "recovery=transfer is about zeros that stand where weights were, and units were cut "
            "out, or matrices replaced: take pruner=unstructured, or pruner.remove=false"
        )
    recipe = Recipe(
        lr=lr,
        warmup_steps=warmup_steps,
        epochs=epochs,
        max_steps=max_steps,
        batch=batch,
        micro_batch=micro_batch,
        log_every=log_every,
        save_every=save_every,
        progress=problem.training,
        seed=seed,
    )
    found = load_examples(problem.tokenizer, dataset, split, path, data_root, max_length)[:examples]
    found = with_prompt(found, model, problem.tokenizer)
    zeros = keep if arm == "sparse" else {}
    still = keep if arm == "frozen" else {}
    if still:
        restore(model, problem.dense(), still)
    model.requires_grad_(True)  # before hooks are put on gradients
    with held(model, still):
        history, trained = train_weights(model, None, found, [], recipe, zeros)
    if arm != "sparse":
        pruned.kept = {name: torch.ones_like(mask) for name, mask in pruned.kept.items()}
    pruned.notes |= history.notes(len(found), trained)
    return model


@torch.no_grad()
def restore(model: nn.Module, dense: nn.Module, keep: Mapping[str, Tensor]) -> None:
    """Gives the elements that `keep` does not have their values in the dense model. Raises
    ConfigError where those that it has are others there: channels were put in another order.
    """
    shapes = {name: p.shape for name, p in dense.named_parameters()}
    for name, mask in keep.items():
        parameter = model.get_parameter(name)
        if shapes.get(name) != parameter.shape:
            raise _elsewhere(name)
        there = dense.get_parameter(name).to(parameter.device, parameter.dtype)
        free = mask.to(parameter.device)
        here, dense_here = parameter[free].double(), there[free].double()
        if free.any() and torch.cosine_similarity(here, dense_here, dim=0) < ALIKE:
            raise _elsewhere(name)
        parameter.copy_(torch.where(free, parameter, there))


def _elsewhere(name: str) -> ConfigError:
    return ConfigError(
        f"recovery.arm=frozen: {name} does not stand where the dense model has it (channels in "
        "another order, pruner.permute=true, or rotated): take sparse or dense"
    )
