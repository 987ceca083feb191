"""NutePrune (Li et al., 2024, arXiv 2402.09773): masks and low-rank updates learn from numerous
teachers, which are the model itself at lower sparsities.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prunekit.architecture.blocks import block_modules, linear_names
from prunekit.data.training_examples import all_learnt
from prunekit.graph.masks import stream_out
from prunekit.problem import Expected, Problem
from prunekit.pruners.learned import (
    Kinds,
    apply_masks,
    check_competing,
    notes_of,
    size_constraint,
)
from prunekit.registry import Above, LearningRate, Natural, Positive, Seed, Share, pruners
from prunekit.training.constraints import ConstraintKind, SizeConstraint
from prunekit.training.distillation import Distillation, state_error
from prunekit.training.learned_masks import LearnedMasks
from prunekit.training.low_rank import Updates
from prunekit.training.masks_and_updates import learn_with_updates
from prunekit.training.recipe import Recipe
from prunekit.types import Pruned

Error = Literal["plain", "relative"]
NEAR = 0.005
"""How near to the target counts as there (the authors' epsilon)."""


def check_nuteprune(
    problem: Problem,
    *,
    kinds: list[str],
    targets: list[str] | None,
    batch: int,
    micro_batch: int,
    remove: bool,
    constraint: ConstraintKind,
    **_: Any,
) -> Expected:
    """Raises ConfigError where the ratio cannot be met, where gates cannot be folded, and for
    batches that cannot be.
    """
    return check_competing(problem, kinds, targets, batch, micro_batch, remove, constraint)


@pruners.register(
    paper="arXiv 2402.09773",
    year=2024,
    needs="gradients",
    out="self-contained",
    scored="optional",
    check=check_nuteprune,
)
def nuteprune(
    problem: Problem,
    *,
    kinds: Kinds = ["heads", "neurons", "hidden"],  # noqa: B006 (never mutated)
    steps: Positive = 1000,
    warmup: Share = 0.5,
    layer_weight: Share = 0.9,
    error: Error = "plain",
    temperature: Above = 2 / 3,
    gap: Positive = 10,
    r: Positive = 8,
    alpha: Positive = 8,
    targets: list[str] | None = None,
    lr: LearningRate = 1e-3,
    warmup_steps: Natural = 100,
    mask_lr: LearningRate = 0.1,
    constraint: ConstraintKind = "lagrangian",
    batch: Positive = 16,
    micro_batch: Positive = 4,
    save_every: Positive = 100,
    seed: Seed = 0,
    remove: bool = True,
) -> Pruned:
    """Learns hard-concrete masks and low-rank updates from teachers that are the same model with
    less removed: snapshots of masks and updates, on one copy of the weights.

    Args:
        kinds: of units that compete (ratio=global), each at what it weighs in parameters.
        steps: of `batch` samples of the calibration text.
        warmup: share of the steps in which the target grows from nothing.
        layer_weight: of the hidden states' error, summed over the blocks; the rest is that of the
            KL, summed over the tokens of a sample (the authors' code).
        error: of the hidden states: `plain` is the mean square (the paper), `relative` divides a
            token's by its teacher's size. Where hidden states are large (SmolLM2, and whatever has
            massive activations) the plain one drowns the KL and the constraint.
        temperature: of the KL.
        gap: how many percent of sparsity the teacher is behind. Once the target is met, teachers go
            back to the dense model over the steps that are left.
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
    have the sparsity that the masks expected, and the teachers' at each step. Nothing changes where
    the ratio removes nothing.
    """
    model = problem.model
    groups = check_competing(
        problem, list(kinds), targets, batch, micro_batch, remove, constraint
    ).groups
    allocation = problem.allocate(groups)
    if allocation.empty:
        return Pruned(model, {}, groups, {}, {"counts": allocation.counts})
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
    teachers = Teachers(masks, budget, steps, gap, error)
    how = Distillation(weight=1.0, temperature=temperature)
    length = problem.tokens.shape[1]

    @contextmanager
    def objective(updates: list[nn.Parameter]) -> Iterator[dict[str, Any]]:
        def penalty(of: nn.Module, step: int) -> Tensor:
            teachers.step = step
            # The KL beside it is a mean over tokens, so that multipliers need not outgrow a sum.
            layers = layer_weight / (1 - layer_weight) * teachers.layer_loss() / length
            return layers + budget(of, step)

        with teachers.on_model(updates):
            teaching = {"teacher": teachers.logits, "distillation": how}
            yield {"penalty": penalty, "beside": [teachers], **teaching}

    low_rank = Updates(linear_names(model, targets), r, alpha, dropout=0.0)
    examples = [all_learnt(row) for row in problem.tokens.tolist()]
    curve = learn_with_updates(masks, low_rank, examples, recipe, budget, mask_lr, objective)
    kept = apply_masks(masks, allocation, remove)
    notes = notes_of(allocation, budget, curve) | {"teachers": teachers.used}
    return Pruned(model, kept, groups, masks.log_alphas(), notes)


def teacher_index(recorded: int, gap: int, done: float | None) -> int:
    """Which of `recorded` snapshots teaches, -1 for the dense model.

    Args:
        done: share of the steps that were left when the target was met, over which teachers go back
            to the dense model in equal parts; None before.
    """
    latest = max(recorded - gap, -1)
    if done is None:
        return latest
    return max(latest - math.floor(done * (latest + 2)), -1)


class Teachers:
    """Snapshots of masks and updates, one for each percent of sparsity; before each forward of the
    student the teacher's runs, on the same weights.
    """

    def __init__(
        self, masks: LearnedMasks, constraint: SizeConstraint, steps: int, gap: int, error: Error
    ):
        self.masks, self.constraint, self.steps, self.gap = masks, constraint, steps, gap
        self.relative = error == "relative"
        self.step = 0
        self.met: int | None = None
        self.updates: list[nn.Parameter] = []
        self.snapshots: list[tuple[Tensor, list[Tensor]]] = []
        self.used: list[int] = []
        self._teaching = False
        self._hidden: dict[bool, list[Tensor]] = {True: [], False: []}
        self._logits: Tensor | None = None
        self._tokens: Tensor | None = None

    @contextmanager
    def on_model(self, updates: list[nn.Parameter]) -> Iterator[None]:
        """Inside, each forward in train mode is preceded by its teacher's."""
        self.updates = updates
        model = self.masks.model
        hooks = [b.register_forward_hook(self._keep_stream) for b in block_modules(model)]
        hooks.append(model.register_forward_pre_hook(self._teach, with_kwargs=True, prepend=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def state(self) -> dict[str, Tensor]:
        """Snapshots, and where the teachers are."""
        tensors = {"step": torch.tensor(self.step), "used": torch.tensor(self.used)}
        if self.met is not None:
            tensors["met"] = torch.tensor(self.met)
        for i, (z, values) in enumerate(self.snapshots):
            tensors |= {f"{i}:z": z} | {f"{i}:{j}": v for j, v in enumerate(values)}
        return tensors

    def go_on(self, state: Mapping[str, Tensor], examples: int) -> None:
        self.step, self.used = int(state["step"]), state["used"].tolist()
        self.met = int(state["met"]) if "met" in state else None
        device = self.masks.log_alpha.device
        self.snapshots = []
        while (z := state.get(f"{len(self.snapshots)}:z")) is not None:
            start = f"{len(self.snapshots)}:"
            values = [state[f"{start}{j}"].to(device) for j in range(len(self.updates))]
            self.snapshots.append((z.to(device), values))

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """(N, T, V) of the teacher for the student's batch."""
        assert self._logits is not None
        return self._logits

    def layer_loss(self) -> Tensor:
        """`state_error`, summed over the blocks; channels that the student has not, and pads, are
        left out.
        """
        terms = []
        for student, teacher in zip(self._hidden[False], self._hidden[True], strict=True):
            there = student != 0
            if self._tokens is not None:
                there &= self._tokens.to(there)[..., None]
            terms.append(state_error(student, teacher, there, self.relative))
        return torch.stack(terms).sum()

    def _keep_stream(self, module: nn.Module, args: Any, output: Any) -> None:
        self._hidden[self._teaching].append(stream_out(output))

    def _teach(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not model.training or self._teaching:
            return
        self._hidden = {True: [], False: []}
        self._tokens = kwargs.get("attention_mask")
        self._record()
        done = None
        if self.met is not None:
            done = (self.step - self.met) / max(1, self.steps - self.met)
        index = teacher_index(len(self.snapshots), self.gap, done)
        self.used.append(index)
        inputs = {k: v for k, v in kwargs.items() if k in ("input_ids", "attention_mask")}
        self._teaching = True
        model.eval()
        with self._snapshot(index), torch.no_grad():
            self._logits = model(*args, **inputs, use_cache=False).logits
        model.train()
        self._teaching = False

    def _record(self) -> None:
        """A snapshot for every percent of sparsity that is passed for the first time."""
        sparsity = float(self.constraint.sparsity().detach())
        ramped = self.step >= self.constraint.warmup
        if self.met is None and ramped and sparsity >= self.constraint.target - NEAR:
            self.met = self.step
        while self.met is None and len(self.snapshots) < math.floor(sparsity * 100):
            z = self.masks.deterministic()
            self.snapshots.append((z, [p.detach().clone() for p in self.updates]))

    @contextmanager
    def _snapshot(self, index: int) -> Iterator[None]:
        """Inside, masks and updates are those of a snapshot; -1 has no masks and no updates."""
        z, values = self._dense() if index < 0 else self.snapshots[index]
        own = [p.data for p in self.updates]
        put(self.updates, values)
        try:
            with self.masks.using(z):
                yield
        finally:
            put(self.updates, own)

    def _dense(self) -> tuple[Tensor, list[Tensor]]:
        ones = torch.ones_like(self.masks.log_alpha)
        return ones, [torch.zeros_like(p) for p in self.updates]


def put(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    """Other tensors in the parameters; what a backward has saved of the former stays valid."""
    for p, value in zip(parameters, values, strict=True):
        p.data = value
