"""Sheared LLaMA (Xia et al., ICLR 2024, arXiv 2310.06694): a model is trained into a given uniform
shape by masks over heads, neurons, residual channels and blocks, all weights learning with them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from prunekit import graph
from prunekit.architecture.modes import eval_mode
from prunekit.checkpoint.stock_counts import StockClass, every_layer
from prunekit.data.training_examples import Example, all_learnt, collate
from prunekit.errors import ConfigError
from prunekit.graph.fold_gates import check_channels
from prunekit.problem import CALIBRATION, Expected, Problem, expect
from prunekit.pruners.learned import check_start, new_masks
from prunekit.registry import LearningRate, Natural, Positive, Seed, Share, pruners
from prunekit.selection.units import expand_to_all_blocks, keep_local
from prunekit.training.constraints import ConstraintKind, KindConstraint, warn_of_missed
from prunekit.training.domains import DomainExamples
from prunekit.training.masks_and_updates import learn
from prunekit.training.recipe import Recipe, micro_batches
from prunekit.training.weights import in_float32
from prunekit.types import Counts, Group, Pruned

Kind = Literal["heads", "neurons", "hidden", "blocks"]
Kinds = Annotated[list[Kind], Field(min_length=1)]
Shape = Annotated[dict[Kind, Positive], Field(min_length=1)]
Losses = dict[str, float]
HELD_OUT = 0.1
"""Share of each domain on which its loss is measured."""


def check_sheared(
    problem: Problem,
    *,
    kinds: list[str],
    shape: Mapping[Kind, int] | None,
    reference: Literal["dense"] | Losses,
    batch: int,
    micro_batch: int,
    constraint: ConstraintKind,
    **_: Any,
) -> Expected:
    """Raises ConfigError where the shape cannot be met or transformers does not build it, where
    gates cannot be folded, and for a criterion that has nothing to say.
    """
    micro_batches(batch, micro_batch)
    check_start(problem, constraint)
    if shape is not None and problem.ratio is not None:
        raise ConfigError("pruner.shape says what stays: give ratio=none with it")
    groups = problem.groups(list(shape or kinds))
    every_layer(problem.model, groups, "stock")
    check_channels(problem.model, groups)
    if shape is None:
        expected = expect(problem, groups)
    else:
        expected = Expected(groups, shape_counts(groups, shape))
    check_uniform(problem.model, groups, expected.counts or {})
    if problem.has_data:
        check_domains(domains_of(problem), reference)
    return expected


def check_domains(
    domains: Mapping[str, Sequence[Example]], reference: Literal["dense"] | Losses
) -> None:
    """Raises ConfigError for a domain without a loss to reach, or of which none can be measured."""
    lacking = [] if reference == "dense" else [n for n in domains if n not in reference]
    if lacking:
        raise ConfigError(f"pruner.reference lacks the loss of {', '.join(lacking)}")
    short = [name for name, of in domains.items() if len(of) < 2]
    if short:
        raise ConfigError(
            f"sheared_llama measures losses on a tenth of each text: {', '.join(short)} has one "
            "sample; give 2 or more"
        )


def shape_counts(groups: Sequence[Group], shape: Mapping[Any, int]) -> Counts:
    """Units that go so that `shape[kind]` stay in each group."""
    for g in groups:
        if shape[g.kind] > g.units:
            raise ConfigError(
                f"pruner.shape: {shape[g.kind]} {g.kind} are to stay, {g.name} has {g.units}; "
                f"possible: 1 to {g.units}"
            )
    return {g.name: g.units - shape[g.kind] for g in groups}


def check_uniform(model: nn.Module, groups: Sequence[Group], counts: Counts) -> None:
    """Raises ConfigError for counts that differ within a kind, or that transformers does not
    build.
    """
    kinds: dict[str, set[int]] = {}
    for g in groups:
        kinds.setdefault(g.kind, set()).add(counts.get(g.name, 0))
    uneven = [kind for kind, found in kinds.items() if len(found) > 1]
    if uneven:
        raise ConfigError(
            f"sheared_llama makes a uniform shape, and the ratio takes different numbers of "
            f"{', '.join(uneven)}: give ratio.loadable=stock, or pruner.shape"
        )
    wanted = {kind: found.pop() for kind, found in kinds.items() if kind != "blocks"}
    names = {kind: [g.name for g in groups if g.kind == kind] for kind in wanted}
    if not StockClass(model, names)(wanted):
        raise ConfigError(
            f"transformers builds no {type(model).__name__} without {wanted} of each group: give "
            "ratio.loadable=stock, or another pruner.shape"
        )


@pruners.register(
    paper="arXiv 2310.06694",
    year=2024,
    needs="gradients",
    out="self-contained",
    scored="optional",
    check=check_sheared,
)
def sheared_llama(
    problem: Problem,
    *,
    kinds: Kinds = ["heads", "neurons", "hidden", "blocks"],  # noqa: B006 (never mutated; the YAML states it)
    shape: Shape | None = None,
    steps: Positive = 3200,
    warmup: Share = 0.2,
    lr: LearningRate = 1e-4,
    warmup_steps: Natural = 320,
    mask_lr: LearningRate = 1.0,
    constraint: ConstraintKind = "lagrangian",
    batch: Positive = 32,
    micro_batch: Positive = 4,
    save_every: Positive = 100,
    reference: Literal["dense"] | Losses = "dense",
    update_every: Positive = 50,
    seed: Seed = 0,
) -> Pruned:
    """Trains a model into a uniform shape: hard-concrete masks under a constraint for each kind of
    unit, all weights with them, the text's domains weighted by how far each is behind.

    Args:
        kinds: of units that the ratio spreads over, the same count in every layer
            (ratio.loadable=stock).
        shape: units that stay in each group of a kind, in place of a ratio (ratio=none), e.g.
            {hidden: 2048, heads: 16, blocks: 24, neurons: 5504}; heads are those of keys.
        steps: of `batch` samples of the calibration text.
        warmup: share of the steps in which the target grows from nothing.
        lr: of the weights, after `warmup_steps`.
        mask_lr: of masks and multipliers, constant.
        constraint: `lagrangian` (the paper), or `exact`: before each step the log alphas of a group
            all move by one number, to the target. For trainings too short for multipliers to
            settle.
        reference: a domain's loss that should be reached: measured on the `dense` model, or given
            by name. Domains are the texts of calib=sequence.
        save_every: steps after which the training keeps how far it is.
        update_every: steps between two measurements of the domains' losses, on a tenth of each.

    With constraint=exact a criterion may say, from the first 64 samples, in which order a group's
    masks begin, so that few units are undecided at a time; with criterion=none all begin alike.

    Weights are trained in float32. What stays has its gates folded into them. Notes have by how
    much the masks expected to miss the shape at the end, and the domains' weights. Nothing changes
    where nothing is to go.
    """
    model = problem.model
    expected = check_sheared(
        problem,
        kinds=list(kinds),
        shape=shape,
        reference=reference,
        batch=batch,
        micro_batch=micro_batch,
        constraint=constraint,
    )
    groups, counts = expected.groups, counts_of(problem, expected)
    if not any(counts.values()):
        return Pruned(model, {}, groups, {}, {"counts": counts})
    pruned = [g for g in groups if counts[g.name]]
    masks = new_masks(problem, pruned, seed, constraint)
    shares = {g.kind: counts[g.name] / g.units for g in pruned}
    budget = KindConstraint(masks, shares, round(warmup * steps), constraint)
    examples = loader(problem, reference, update_every * batch, micro_batch, seed)
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
    with in_float32(model):
        model.requires_grad_(True)
        with masks.on_model():
            history = learn(masks, examples, recipe, budget, mask_lr, beside=[examples])
        kept = keep_local(masks.log_alphas(), counts)
        masks.hold(kept)
        masks.fold()
    kept = expand_to_all_blocks(kept, pruned, problem.units([g.kind for g in pruned]))
    graph.remove(model, kept, norm="rescale")
    config_follows(model, pruned, counts)
    for kind, missed in budget.missed().items():
        warn_of_missed(kind, missed, shares[kind])
    notes = {
        "counts": counts,
        "curve": history.curve,
        "missed": budget.missed(),
        "domain_weights": examples.history,
        "domain_reference": dict(examples.reference),
    }
    return Pruned(model, kept, groups, masks.log_alphas(), notes)


def counts_of(problem: Problem, expected: Expected) -> Counts:
    """Of the shape, or where none is given as `ratio` says: the same for all groups of a kind."""
    if expected.counts is not None:
        return expected.counts
    counts = problem.allocate(expected.groups).counts
    check_uniform(problem.model, expected.groups, counts)
    return counts


def config_follows(model: nn.Module, groups: Sequence[Group], counts: Counts) -> None:
    """The norms' eps grew with the share of channels that went; stock classes read it here, the
    same one for norms that span something else (those of queries and keys).
    """
    config: Any = model.config
    text = config.get_text_config()
    for g in groups:
        if g.kind != "hidden":
            continue
        for name, value in list(vars(text).items()):
            if "eps" in name and isinstance(value, float):
                setattr(text, name, value * (g.units / (g.units - counts[g.name])))


def loader(
    problem: Problem,
    reference: Literal["dense"] | Losses,
    every: int,
    micro_batch: int,
    seed: int,
) -> DomainExamples:
    """The domains' text, weighed anew every `every` examples by losses on a tenth of each."""
    model, domains = problem.model, domains_of(problem)
    held = {name: of[: held_out(of)] for name, of in domains.items()}
    aims = domain_losses(model, held, micro_batch) if reference == "dense" else reference
    rest = {name: of[held_out(of) :] for name, of in domains.items()}
    return DomainExamples(rest, lambda: domain_losses(model, held, micro_batch), aims, every, seed)


def domains_of(problem: Problem) -> dict[str, list[Example]]:
    """The named texts, or the calibration text where there is one only."""
    named = {n: t for n, t in problem.token_sets.items() if n != CALIBRATION}
    texts: Mapping[str, Tensor] = named or {CALIBRATION: problem.tokens}
    return {name: [all_learnt(row) for row in t.tolist()] for name, t in texts.items()}


def held_out(examples: Sequence[Example]) -> int:
    """How many of a domain's samples its loss is measured on."""
    return min(math.ceil(HELD_OUT * len(examples)), len(examples) - 1)


@torch.no_grad()
def domain_losses(
    model: nn.Module, held: Mapping[str, Sequence[Example]], batch: int
) -> dict[str, float]:
    """Mean loss of a token by domain, in eval mode; 0 where there is one domain only, which needs
    no weighing.
    """
    if len(held) < 2:
        return dict.fromkeys(held, 0.0)
    device = next(model.parameters()).device
    means = {}
    with eval_mode(model):
        for name, examples in held.items():
            losses = []
            for i in range(0, len(examples), batch):
                part = examples[i : i + batch]
                inputs = {k: v.to(device) for k, v in collate(list(part)).items()}
                losses.append(model(**inputs).loss * len(part))
            means[name] = float(torch.stack(losses).sum()) / len(examples)
    return means
