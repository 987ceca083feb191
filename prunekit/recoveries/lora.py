"""LoRA (Hu et al., arXiv 2106.09685) as LLM-Pruner recovers with it (arXiv 2305.11627, README
recipe), merged at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import Field
from torch import Tensor, nn

from prunekit import graph
from prunekit.architecture.blocks import linear_names
from prunekit.data.files import DataRoot, TextFile
from prunekit.data.training_examples import (
    Corpus,
    Example,
    check_source,
    load_examples,
    split_validation,
)
from prunekit.problem import Problem
from prunekit.registry import LearningRate, Length, Natural, Positive, Seed, Share, recoveries
from prunekit.training.recipe import Recipe, micro_batches
from prunekit.types import Pruned

if TYPE_CHECKING:
    from prunekit.training.trainer import History

Rate = Annotated[float, Field(gt=0)]


def check_lora(
    model: nn.Module,
    *,
    dataset: Corpus,
    split: str | None,
    path: str | None,
    targets: list[str] | None,
    batch: int,
    micro_batch: int,
    **_: Any,
) -> None:
    """Raises ConfigError for options of `lora` that cannot be, as far as the shapes of `model`
    decide (on any device, meta included); no data is read.
    """
    linear_names(model, targets)
    micro_batches(batch, micro_batch)
    check_source(dataset, split, path)


@recoveries.register(
    paper="arXiv 2106.09685",
    year=2021,
    needs="data",
    out="self-contained",
    check=check_lora,
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
    epochs: Rate = 2,
    max_steps: Positive | None = None,
    batch: Positive = 64,
    micro_batch: Positive = 4,
    eval_every: Positive = 100,
    log_every: Positive = 10,
    seed: Seed = 42,
) -> nn.Module:
    """Low-rank updates of all linear layers, trained on instructions or plain text and merged into
    the weights.

    Linear layers are all those inside of the decoder's blocks; `targets` narrows them to names or
    glob patterns (`q_proj`, `mlp.*`). With `validation_size` examples set aside, the updates with
    the lowest loss on them are merged, else the last ones. What pruning set to zero is zero
    afterwards: updates of rows and columns that are zero as a whole are not trained there; what an
    update writes to other zeros (single weights) is lost in the merge. Leaves `recovery_curve`
    (step, loss, learning_rate, grad_norm, eval_loss), `recovery_best_step`, `recovery_examples` and
    `recovery_trained_params` in `pruned.notes`. Raises ConfigError for targets that match nothing
    or data that holds nothing.
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
        seed=seed,
    )
    micro_batches(batch, micro_batch)  # said before the data is read
    examples = load_examples(problem.tokenizer, dataset, split, path, data_root, max_length)
    examples, validation = split_validation(examples, validation_size, seed)
    keep = graph.zero_masks(model, pruned.groups, pruned.kept)
    history, trained = train_and_merge(model, updates, examples, validation, recipe, keep)
    pruned.notes |= {
        "recovery_curve": history.curve,
        "recovery_best_step": history.best_step,
        "recovery_examples": len(examples),
        "recovery_trained_params": trained,
    }
    return model


class Updates(NamedTuple):
    """Low-rank updates `alpha / r * B A` of the linear layers of these names."""

    names: Sequence[str]
    r: int
    alpha: int
    dropout: float


def train_and_merge(
    model: nn.Module,
    updates: Updates,
    examples: Sequence[Example],
    validation: Sequence[Example],
    recipe: Recipe,
    keep: Mapping[str, Tensor],
) -> tuple[History, int]:
    """Trains the updates and adds them to the weights; what requires gradients is as it was, and
    what `keep` says is zero. Returns the history and how many parameters were trained.
    """
    from transformers import set_seed

    from prunekit.training.trainer import train
    from prunekit.training.zeros import apply_masks

    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    set_seed(recipe.seed)  # the updates start at random
    inject(model, updates)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    factors = factor_masks(model, updates.names, keep)
    history = train(model, examples, recipe, validation=validation, keep=factors)
    merge(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags[name])
    apply_masks(model, keep)
    return history, trained


def inject(model: nn.Module, updates: Updates) -> None:
    """Puts float32 low-rank updates on the named layers and freezes all else."""
    from peft import LoraConfig, inject_adapter_in_model

    transposed = not isinstance(model.get_submodule(updates.names[0]), nn.Linear)
    config = LoraConfig(
        r=updates.r,
        lora_alpha=updates.alpha,
        lora_dropout=updates.dropout,
        bias="none",
        target_modules=list(updates.names),
        fan_in_fan_out=transposed,
    )
    inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()  # updates of 1e-4 vanish in bfloat16


def merge(model: nn.Module) -> None:
    """Adds the updates to the weights and puts the original layers back, so that nothing of peft is
    left.
    """
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    del model.peft_config


def factor_masks(
    model: nn.Module, names: Sequence[str], keep: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Masks of the factors of the updates on the named layers, so that `B A` is zero in the rows
    and columns that are zero as a whole.

    keep: masks of the weights, stored as the weights are.
    """
    masks: dict[str, Tensor] = {}
    for name in names:
        layer: Any = model.get_submodule(name)
        if f"{name}.weight" not in keep:
            continue
        stored = keep[f"{name}.weight"]
        mask = stored if isinstance(layer.get_base_layer(), nn.Linear) else stored.T  # (out, in)
        for factor, free in (("lora_A", mask.any(0)[None, :]), ("lora_B", mask.any(1)[:, None])):
            if not free.all():
                weight = f"{name}.{factor}.default.weight"
                masks[weight] = free.expand_as(model.get_parameter(weight))
    return masks
