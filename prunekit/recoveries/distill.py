"""Distillation: the pruned model learns what the dense one says of every next token (Hinton et al.,
arXiv 1503.02531; of pruned models Minitron, arXiv 2407.14679).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import nn

from prunekit import graph
from prunekit.architecture.blocks import block_names, linear_names
from prunekit.architecture.offload import put_beside
from prunekit.data.files import DataRoot, TextFile
from prunekit.data.generation import Sampling, generate_text
from prunekit.data.kept_prompt import with_prompt
from prunekit.data.training_examples import (
    Corpus,
    all_learnt,
    check_source,
    check_training_text,
    load_examples,
    split_validation,
)
from prunekit.errors import ConfigError
from prunekit.graph.edit_record import Remaining
from prunekit.problem import Problem
from prunekit.registry import Above, LearningRate, Length, Natural, Positive, Seed, recoveries
from prunekit.training.distillation import Direction, Distillation
from prunekit.training.int8 import check_int8, to_int8
from prunekit.training.low_rank import Updates, check_updates, train_and_merge
from prunekit.training.recipe import Recipe, check_patience, micro_batches
from prunekit.training.weights import train_weights
from prunekit.types import Pruned

Weight = Annotated[float, Field(gt=0, le=1)]
Factor = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Source = Literal[Corpus, "generated"]


def check_distill(
    model: nn.Module,
    *,
    dataset: Source,
    split: str | None,
    path: str | None,
    samples: int,
    validation_size: int,
    teacher_bits: int | None,
    r: int,
    targets: list[str] | None,
    batch: int,
    micro_batch: int,
    patience: int | None,
    **_: Any,
) -> None:
    """Raises ConfigError for options of `distill` that cannot be, as far as the shapes of `model`
    decide; no data is read.
    """
    names = linear_names(model, targets)
    if r:
        check_updates(model, names)
    micro_batches(batch, micro_batch)
    check_patience(patience, validation_size)
    if teacher_bits:
        check_int8("recovery.teacher_bits")
    if dataset != "generated":
        check_source(dataset, split, path)
    elif split is not None or path is not None:
        raise ConfigError(
            "dataset=generated is written by the dense model: split and path are of no use"
        )
    elif validation_size >= samples:
        raise ConfigError(
            f"validation_size={validation_size}, but samples={samples} texts are generated; "
            f"possible: 0 to {samples - 1}"
        )


def check_text(tokenizer: Any, *, dataset: Source, **options: Any) -> None:
    """Raises ConfigError for a text that cannot be learnt from; what the dense model writes is not
    there yet.
    """
    if dataset != "generated":
        check_training_text(tokenizer, dataset=dataset, **options)


@recoveries.register(
    paper="arXiv 1503.02531, 2407.14679",
    year=2024,
    needs="data",
    dense=True,
    out="self-contained",
    check=check_distill,
    tokenized=check_text,
    context=("max_length",),
)
def distill(
    problem: Problem,
    pruned: Pruned,
    *,
    dataset: Source = "alpaca",
    split: str | None = None,
    path: TextFile | None = None,
    data_root: DataRoot = None,
    samples: Positive = 1024,
    max_length: Length = 256,
    validation_size: Natural = 100,
    weight: Weight = 1.0,
    temperature: Above = 1.0,
    direction: Direction = "forward",
    hidden: Factor = 0.0,
    teacher_bits: Literal[8] | None = None,
    r: Natural = 0,
    alpha: Positive = 16,
    targets: list[str] | None = None,
    lr: LearningRate = 1e-4,
    warmup_steps: Natural = 100,
    epochs: Above = 1,
    max_steps: Positive | None = None,
    batch: Positive = 64,
    micro_batch: Positive = 4,
    eval_every: Positive = 100,
    log_every: Positive = 10,
    save_every: Positive = 100,
    patience: Positive | None = None,
    seed: Seed = 42,
) -> nn.Module:
    """Trains the weights, or low-rank updates of them, to give the dense model's distribution of
    the next token.

    Args:
        dataset: plain text, instructions, or `generated`: texts that the dense model writes.
        samples: of dataset=generated: how many texts, of `max_length` tokens each.
        validation_size: examples set aside; the weights with the lowest cross entropy on them are
            kept.
        weight: of the KL to the dense model in the loss; the rest is cross entropy.
        temperature: of both distributions in the KL.
        direction: `forward` is KL(dense || pruned), `reverse` KL(pruned || dense).
        hidden: weight of the relative squared distance to the dense model's residual stream after
            each block but the last, which is added.
        teacher_bits: 8 keeps the linear weights of the dense model in int8.
        r: rank of the updates, merged at the end; 0 trains the weights themselves.
        targets: names or patterns of linear layers that are trained; null is all of the blocks,
            with r=0 all parameters of the model.
        patience: looks in a row at the validation without a lower loss that end the training.

    What pruning set to zero stays zero. A model in half precision is trained in float32 (updates
    vanish in less) and comes back in its own. Leaves the notes that `recovery=lora` leaves. Raises
    ConfigError for targets that match nothing, data that holds nothing, where the dense model
    cannot be loaded, or with `hidden` where its residual stream is wider or its blocks are others.
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
    names = linear_names(model, targets)
    micro_batches(batch, micro_batch)  # said before the data is read
    check_patience(patience, validation_size)
    teacher = put_beside(problem.dense(), model).requires_grad_(False).eval()
    if teacher_bits:
        to_int8(teacher)
    blocks = same_blocks(model, teacher) if hidden else ()
    if dataset == "generated":
        sampling = Sampling(temperature=1.0, seed=seed, batch=32)
        rows = generate_text(teacher, problem.tokenizer, samples, max_length, sampling)
        examples = [all_learnt(row) for row in rows.tolist()]
    else:
        examples = load_examples(problem.tokenizer, dataset, split, path, data_root, max_length)
    examples = with_prompt(examples, model, problem.tokenizer)
    examples, validation = split_validation(examples, validation_size, seed)
    keep = graph.zero_masks(model, pruned.groups, pruned.kept)
    how = Distillation(weight, temperature, direction, hidden, blocks)
    if r:
        updates = Updates(names, r, alpha, dropout=0.0)
        history, trained = train_and_merge(
            model, updates, examples, validation, recipe, keep, teacher, how
        )
    else:
        history, trained = train_weights(
            model,
            None if targets is None else parameters_of(model, names),
            examples,
            validation,
            recipe,
            keep,
            teacher=teacher,
            distillation=how,
        )
    pruned.notes |= history.notes(len(examples), trained)
    return model


def same_blocks(model: nn.Module, teacher: nn.Module) -> tuple[int, ...]:
    """The teacher's block that each block of a pruned model was. Raises ConfigError where residual
    channels went, or where the numbers of blocks do not agree.
    """
    here, there = (
        m.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
        for m in (model, teacher)
    )
    if here != there:
        raise ConfigError(
            f"recovery.hidden: the pruned model's residual stream has {here} channels, the dense "
            f"one's {there}, so their states cannot be compared; possible: 0"
        )
    left, there = (left_of(m) for m in (model, teacher))
    if left["of"] != there["of"] or not set(left["keep"]) <= set(there["keep"]):
        raise ConfigError(
            f"recovery.hidden: {left['of']} blocks before pruning, and the dense model has "
            f"{there['of']}, of which {there['keep']} are left"
        )
    return tuple(there["keep"].index(block) for block in left["keep"])


def left_of(model: nn.Module) -> Remaining:
    """Which blocks a model has of those that it had before anything was pruned."""
    names = block_names(model)
    whole: Remaining = {"of": len(names), "keep": list(range(len(names)))}
    return graph.edits(model)["blocks"].get(names[0].rpartition(".")[0], whole)


def parameters_of(model: nn.Module, modules: Sequence[str]) -> set[str]:
    """Names of the weights and biases of modules."""
    return {
        f"{name}.{leaf}"
        for name in modules
        for leaf, _ in model.get_submodule(name).named_parameters()
    }
