"""PERP (Zimmer et al., 2023, arXiv 2312.15230): a small part of the parameters makes up for what
pruning took.
"""

from __future__ import annotations

from typing import Any, Literal

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
from prunekit.errors import ConfigError
from prunekit.problem import Problem
from prunekit.registry import Above, LearningRate, Length, Natural, Positive, Seed, recoveries
from prunekit.training.masked_low_rank import Form, MaskedUpdates
from prunekit.training.recipe import Recipe, check_patience, micro_batches
from prunekit.training.weights import is_norm, train_weights
from prunekit.types import Pruned

Part = Literal["norms", "biases", "head"]


def check_perp(
    model: nn.Module,
    *,
    dataset: Corpus,
    split: str | None,
    path: str | None,
    parts: list[Part],
    updates: Form | None,
    targets: list[str] | None,
    validation_size: int,
    batch: int,
    micro_batch: int,
    patience: int | None,
    **_: Any,
) -> None:
    """Raises ConfigError for options of `perp` that cannot be, as far as the shapes of `model`
    decide; no data is read.
    """
    part_names(model, parts)
    if not parts and updates is None:
        raise ConfigError("recovery.parts=[] recovery.updates=null: there is nothing to train")
    if updates is None and targets is not None:
        raise ConfigError("recovery.targets are of updates: give recovery.updates=mask or scale")
    linear_names(model, targets)
    micro_batches(batch, micro_batch)
    check_patience(patience, validation_size)
    check_source(dataset, split, path)


@recoveries.register(
    paper="arXiv 2312.15230",
    year=2023,
    needs="data",
    out="self-contained",
    check=check_perp,
    tokenized=check_training_text,
    context=("max_length",),
)
def perp(
    problem: Problem,
    pruned: Pruned,
    *,
    dataset: Corpus = "alpaca",
    split: str | None = None,
    path: TextFile | None = None,
    data_root: DataRoot = None,
    max_length: Length = 256,
    validation_size: Natural = 100,
    parts: list[Part] = ["norms"],  # noqa: B006  read only
    updates: Form | None = "mask",
    r: Positive = 16,
    alpha: Positive = 32,
    targets: list[str] | None = None,
    lr: LearningRate = 5e-4,
    warmup_steps: Natural = 10,
    epochs: Above = 1,
    max_steps: Positive | None = None,
    batch: Positive = 16,
    micro_batch: Positive = 4,
    eval_every: Positive = 100,
    log_every: Positive = 10,
    save_every: Positive = 100,
    patience: Positive | None = None,
    seed: Seed = 42,
) -> nn.Module:
    """Trains norms, biases or the output matrix as they are, and low-rank updates of the linear
    layers that keep every zero.

    Args:
        parts: `norms` (their weights), `biases` of all modules, `head`: the
            output matrix, unless it is the embedding too.
        updates: `mask` adds `alpha / r M * (B A)` with the mask of the weights (MaskLoRA), `scale`
            multiplies by `B A` (ScaleLoRA), null trains the parts alone (0.03 % of SmolLM2 are
            norms). Both know the mask while they are trained, unlike recovery=lora.
        r: rank of the updates.
        alpha: of updates=mask.
        targets: names or patterns of linear layers in a block that get updates; null is all.

    Data and steps are those of `recovery=lora`, and so are the notes. A model in half
    precision is trained in float32 and comes back in its own. Raises ConfigError for parts and
    targets that the model lacks, and data that holds nothing.
    """
    model = pruned.model
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
    names = part_names(model, parts)
    layers = linear_names(model, targets)
    micro_batches(batch, micro_batch)  # said before the data is read
    check_patience(patience, validation_size)
    examples = load_examples(problem.tokenizer, dataset, split, path, data_root, max_length)
    examples = with_prompt(examples, model, problem.tokenizer)
    examples, validation = split_validation(examples, validation_size, seed)
    keep = graph.zero_masks(model, pruned.groups, pruned.kept)
    low_rank = MaskedUpdates(layers, updates, r, alpha) if updates else None
    history, trained = train_weights(
        model, names, examples, validation, recipe, keep, updates=low_rank
    )
    pruned.notes |= history.notes(len(examples), trained)
    return model


def part_names(model: nn.Module, parts: list[Part]) -> set[str]:
    """Names of the parameters of these parts. Raises ConfigError for one that the model lacks, and
    for an output matrix that is the embedding.
    """
    found: dict[Part, set[str]] = {part: set() for part in parts}
    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, parameter in model.named_parameters():  # what is tied comes once, as the embedding
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        part: Part | None = None
        if leaf == "bias":
            part = "biases"
        elif is_norm(name, parameter):
            part = "norms"
        elif module is head:
            part = "head"
        if part in found:
            found[part].add(name)
    for part, names in found.items():
        if not names:
            there = "norms" if part != "norms" else "biases"
            why = (
                "the output matrix is the embedding, which would change with it"
                if part == "head"
                else f"no module has {part}"
            )
            raise ConfigError(f"recovery.parts: {part}: {why}; try {there}, or recovery.updates")
    return set().union(*found.values())
