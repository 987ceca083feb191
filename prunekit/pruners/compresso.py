"""Compresso (Guo et al., 2023, arXiv 2310.05015): masks over heads, neurons and residual channels
learn together with low-rank updates during instruction tuning, under a prompt that says so.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from prunekit.architecture.blocks import linear_names
from prunekit.data.files import DataRoot, TextFile
from prunekit.data.kept_prompt import with_prompt
from prunekit.data.training_examples import (
    Corpus,
    Example,
    check_source,
    check_training_text,
    load_examples,
)
from prunekit.errors import ConfigError
from prunekit.problem import Expected, Problem
from prunekit.pruners.learned import (
    Kinds,
    apply_masks,
    check_competing,
    notes_of,
    size_constraint,
)
from prunekit.registry import LearningRate, Length, Natural, Positive, Seed, Share, pruners
from prunekit.training.constraints import ConstraintKind
from prunekit.training.low_rank import Updates
from prunekit.training.masks_and_updates import learn_with_updates
from prunekit.training.recipe import Recipe
from prunekit.types import Pruned

PROMPT = (
    "You are a language model of which parts are being taken away: attention heads, neurons and "
    "channels that the answers can do without are switched off one by one. Work with the parts "
    "that you still have, let them do what the missing ones did, and answer as well as before.\n\n"
)


def check_compresso(
    problem: Problem,
    *,
    kinds: list[str],
    dataset: Corpus,
    split: str | None,
    path: str | None,
    targets: list[str] | None,
    batch: int,
    micro_batch: int,
    remove: bool,
    constraint: ConstraintKind,
    **_: Any,
) -> Expected:
    """Raises ConfigError where the ratio cannot be met, where gates cannot be folded, and for data
    and batches that cannot be.
    """
    check_source(dataset, split, path)
    return check_competing(problem, kinds, targets, batch, micro_batch, remove, constraint)


@pruners.register(
    paper="arXiv 2310.05015",
    year=2023,
    needs="gradients",
    out="self-contained",
    scored="optional",
    check=check_compresso,
    tokenized=check_training_text,
)
def compresso(
    problem: Problem,
    *,
    kinds: Kinds = ["heads", "neurons", "hidden"],  # noqa: B006 (never mutated)
    prompt: bool = True,
    dataset: Corpus = "alpaca",
    split: str | None = None,
    path: TextFile | None = None,
    data_root: DataRoot = None,
    max_length: Length = 256,
    steps: Positive = 1000,
    warmup: Share = 0.5,
    r: Positive = 8,
    alpha: Positive = 8,
    targets: list[str] | None = None,
    lr: LearningRate = 5e-5,
    warmup_steps: Natural = 100,
    mask_lr: LearningRate = 0.1,
    constraint: ConstraintKind = "lagrangian",
    batch: Positive = 8,
    micro_batch: Positive = 4,
    save_every: Positive = 100,
    seed: Seed = 0,
    remove: bool = True,
) -> Pruned:
    """Learns hard-concrete masks together with low-rank updates on instructions, under a prompt
    that tells the model of it, until as many parameters are gone as the ratio takes.

    Args:
        kinds: of units that compete (ratio=global), each at what it weighs in parameters.
        prompt: puts the collaborative prompt before each instruction. It stays with the model, as
            `collaborative_prompt` in its config, and evaluations and recoveries put it before
            their text.
        dataset: what is learnt, with split, path and data_root as of recovery=lora.
        max_length: tokens of an example, to which the prompt's are added.
        steps: of `batch` examples.
        warmup: share of the steps in which the target grows from nothing.
        r: rank of the updates.
        alpha: updates are scaled by alpha / r.
        targets: of the updates; null is all linear modules (the paper's are q_proj and v_proj).
        lr: of the updates, after `warmup_steps`.
        mask_lr: of masks and multipliers, constant.
        constraint: `lagrangian` (the paper), or `exact`: before each step log alphas all move by
            one number, to the target. For trainings too short for multipliers to settle.
        save_every: steps after which the training keeps how far it is.
        remove: false zeroes instead of removing.

    With constraint=exact a criterion may say, from the first 64 samples, in which order a group's
    masks begin, so that few units are undecided at a time; with criterion=none all begin alike.

    The masks' order decides what goes, and what stays has its gates folded into the weights. Notes
    have the sparsity that the masks expected. Nothing changes where the ratio removes nothing.
    """
    model = problem.model
    groups = check_compresso(
        problem,
        kinds=list(kinds),
        dataset=dataset,
        split=split,
        path=path,
        targets=targets,
        batch=batch,
        micro_batch=micro_batch,
        remove=remove,
        constraint=constraint,
    ).groups
    allocation = problem.allocate(groups)
    if allocation.empty:
        return Pruned(model, {}, groups, {}, {"counts": allocation.counts})
    examples = load_examples(problem.tokenizer, dataset, split, path, data_root, max_length)
    if prompt:
        config: Any = model.config
        config.collaborative_prompt = PROMPT
        examples = with_prompt(examples, model, problem.tokenizer)
    check_positions(model, examples)
    recipe = Recipe(
        lr=lr,
        warmup_steps=warmup_steps,
        max_steps=steps,
        batch=batch,
        micro_batch=micro_batch,
        save_every=save_every,
        progress=problem.training,
        seed=seed,
    )
    budget = size_constraint(problem, groups, allocation, seed, round(warmup * steps), constraint)
    masks = budget.masks
    updates = Updates(linear_names(model, targets), r, alpha, dropout=0.0)
    curve = learn_with_updates(masks, updates, examples, recipe, budget, mask_lr)
    kept = apply_masks(masks, allocation, remove)
    notes = notes_of(allocation, budget, curve) | {"prompt": PROMPT if prompt else None}
    return Pruned(model, kept, groups, masks.log_alphas(), notes)


def check_positions(model: nn.Module, examples: list[Example]) -> None:
    """Raises ConfigError for examples longer than the model can read."""
    config: Any = model.config
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    longest = max((len(e["input_ids"]) for e in examples), default=0)
    if positions is not None and longest > positions:
        raise ConfigError(
            f"compresso: an example has {longest} tokens with the prompt, and the model has "
            f"{positions} positions; give a smaller pruner.max_length, or prompt=false"
        )
