"""Training of whatever requires gradients in a model, for every recovery and every learned mask, by
transformers' Trainer: one process or several, one device or many.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, NamedTuple, NotRequired, TypedDict, cast

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import ProgressCallback, TrainerCallback
from transformers.loss.loss_utils import ForCausalLMLoss

from prunekit.data.training_examples import Example, collate
from prunekit.errors import ConfigError
from prunekit.training.arguments import arguments, weights_dtype
from prunekit.training.callbacks import Bar, Best, Curve, OutsideGradients
from prunekit.training.distillation import (
    Distillation,
    Teacher,
    learnt_positions,
    said_by,
    summed_loss,
)
from prunekit.training.recipe import (
    Recipe,
    check_patience,
    linear_decay,
    processes,
    warn_of_warmup,
)
from prunekit.training.resume import Beginning, SavedTraining, Stateful
from prunekit.training.sharding import (
    ShardingTrainer,
    Shards,
    on_same_memory,
    training_device,
    wants_shards,
)
from prunekit.training.zeros import held_at_zero

Penalty = Callable[[nn.Module, int], Tensor]
"""`penalty(model, step)`: a scalar that is added to the loss; `step` counts from 0."""


class ParameterGroup(TypedDict):
    """Parameters that are trained beside those of the model, e.g. the logits of learned masks.

    lr: their own learning rate, with the warm-up and decay of the model's unless `constant`.
    maximize: gradient ascent, e.g. for multipliers of a Lagrangian.
    """

    params: Sequence[nn.Parameter]
    lr: float
    maximize: NotRequired[bool]
    constant: NotRequired[bool]


class History(NamedTuple):
    """`curve`: records of `step` with loss, learning_rate, grad_norm or eval_loss. `best_step`:
    the one whose parameters were kept, None without validation examples.
    """

    curve: list[dict[str, Any]]
    best_step: int | None

    def notes(self, examples: int, trained: int) -> dict[str, Any]:
        """What a recovery leaves in `Pruned.notes`, with the numbers of examples and of trained
        parameters.
        """
        return {
            "recovery_curve": self.curve,
            "recovery_best_step": self.best_step,
            "recovery_examples": examples,
            "recovery_trained_params": trained,
        }


def train(
    model: nn.Module,
    examples: Sequence[Example],
    recipe: Recipe,
    *,
    validation: Sequence[Example] = (),
    keep: Mapping[str, Tensor] | None = None,
    teacher: Teacher | None = None,
    distillation: Distillation | None = None,
    penalty: Penalty | None = None,
    parameters: Sequence[ParameterGroup] = (),
    beside: Sequence[Stateful] = (),
    callbacks: Sequence[TrainerCallback] = (),
) -> History:
    """Trains in place, by AdamW without weight decay, what requires gradients in `model`, and
    `parameters`.

    validation: examples whose cross entropy picks the step that is kept, and with
        `recipe.patience` ends the training; without any it is the last one.
    keep: parameter name -> bool tensor of its shape, True = free; the rest is zero and stays zero.
    teacher: gives the logits that the student is drawn to, by the formula of `distillation`.
    distillation: weight, temperature and direction; None takes its defaults.
    penalty: added to the loss once a step; gradients reach it as they reach the loss.
    parameters: their gradients are not clipped; the model's are, to a norm of 1. Not with FSDP.
    beside: what else must be as it was for a training that goes on.
    callbacks: what else is done between the steps.

    Mixed precision follows the weights: bfloat16 or (on an accelerator) float16 where the model is
    loaded in it. The model is left in eval mode on the device where it was, with nothing of the
    Trainer on it. With `recipe.progress` the same training, cut off and begun again, goes on from
    the last step that was kept; else nothing is written. `loss` in the curve is all that is
    minimised, `eval_loss` the cross entropy, a mean over the validation's labels. Raises
    ConfigError if the batch cannot be made of micro-batches, nothing is there to train, or nothing
    to be patient with.
    """
    student = on_same_memory(model) if wants_shards() else model
    inside = [p for p in student.parameters() if p.requires_grad]
    outside = [p for group in parameters for p in group["params"]]
    if not inside + outside:
        raise ConfigError("nothing to train: no parameter requires gradients")
    if outside and student is not model:
        raise ConfigError(
            "FSDP: parameters outside of the model cannot be trained with shards of it"
        )
    check_patience(recipe.patience, len(validation))
    if teacher is None and distillation is not None:
        raise ConfigError(f"{distillation} needs a teacher")
    groups: list[ParameterGroup] = [{"params": inside, "lr": recipe.lr}] if inside else []
    groups += parameters
    curve, best = Curve(), Best(inside + outside, recipe.patience)
    alone = processes() == 1
    saved = SavedTraining(recipe, curve, best, beside) if recipe.progress and alone else None
    shards = Shards(model, keep or {}, best) if student is not model else None
    device = training_device(model)
    with (
        tempfile.TemporaryDirectory() as folder,
        restored(model),
        held_at_zero(model, keep or {}),
    ):
        trainer = _Trainer(
            _Additions(teacher, distillation or Distillation(), penalty),
            saved,
            compute_loss_func=text_loss,
            model=student,
            args=arguments(recipe, folder, weights_dtype(model), device, bool(validation)),
            train_dataset=examples,
            eval_dataset=validation or None,
            data_collator=collate,
        )
        # No argument: with shards the Trainer refuses one, though accelerate moves it to them.
        trainer.optimizer = AdamW([dict(group) for group in groups], weight_decay=0.0)
        trainer.shards = shards
        trainer.remove_callback(ProgressCallback)
        watching = [best] if validation else []
        for callback in (curve, Bar(), OutsideGradients(outside), *callbacks, *watching):
            trainer.add_callback(callback)
        if shards:
            trainer.add_callback(shards)
        if saved:
            trainer.add_callback(Beginning(saved, trainer))
        trainer.train(resume_from_checkpoint=saved.trainer_folder(folder) if saved else None)
        best.restore()
        if shards:
            shards.gather()
    return History(curve.records, best.step)


class _Additions(NamedTuple):
    teacher: Teacher | None
    distillation: Distillation
    penalty: Penalty | None


class _Trainer(ShardingTrainer):
    """The Trainer with an objective of our own, and a schedule for each group of parameters."""

    def __init__(self, additions: _Additions, saved: SavedTraining | None, **kwargs: Any):
        super().__init__(**kwargs)
        self.additions, self.saved = additions, saved

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        over = self.control.should_training_stop or self.state.global_step >= self.state.max_steps
        if self.saved and not over:
            self.saved.write(self)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if self.saved:
            self.saved.restore_weights()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.saved and checkpoint is not None:
            self.saved.restore_optimizer(self)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if self.saved and checkpoint is not None:
            self.saved.restore_scale(self)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self.saved and checkpoint is not None:
            self.saved.restore_generators()

    def create_scheduler(
        self, num_training_steps: int, optimizer: Optimizer | None = None
    ) -> LambdaLR:
        warmup = int(self.args.warmup_steps)
        warn_of_warmup(warmup, num_training_steps)
        decay = partial(linear_decay, warmup_steps=warmup, steps=num_training_steps)
        trained = cast(Optimizer, optimizer or self.optimizer)
        factors = [
            (lambda step: 1.0) if group.get("constant") else decay for group in trained.param_groups
        ]
        self.lr_scheduler = LambdaLR(trained, factors)
        return self.lr_scheduler

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        asked = {"output_hidden_states": True} if self.additions.distillation.hidden else {}
        loss, outputs = super().compute_loss(model, inputs | asked, True, num_items_in_batch)
        if model.training:
            loss = self.with_additions(loss, outputs, inputs, num_items_in_batch)
        else:
            # The Trainer weighs validation losses by their examples: this way every label counts
            # alike, however they fall into micro-batches and processes.
            examples = self.accelerator.num_processes * len(inputs["labels"])
            loss = loss * num_items_in_batch / (examples * self.labels_each)
        return (loss, outputs) if return_outputs else loss

    @cached_property
    def labels_each(self) -> float:
        """Labels of an example of the validation, on average."""
        examples: Any = self.eval_dataset
        labels = sum(n != -100 for e in examples for n in e["labels"])
        return float(labels / len(examples))

    def with_additions(
        self, loss: Tensor, outputs: Any, batch: dict[str, Tensor], items: Any
    ) -> Tensor:
        """The loss of one micro-batch with the teacher's and the penalty's part, by the labels of
        the whole step (`items`): micro-batches add up, and processes are averaged.
        """
        teacher, distillation, penalty = self.additions
        if teacher is not None:
            learnt = learnt_positions(batch["labels"])
            if self.shards and isinstance(teacher, nn.Module):
                teacher = self.shards.teacher_of(teacher, self.accelerator)
            target = said_by(teacher, batch, hidden=distillation.hidden > 0)
            taught = summed_loss(distillation, outputs, target, learnt).to(loss.device)
            taught = taught / items * self.accelerator.num_processes
            loss = (1 - distillation.weight) * loss + taught
        if penalty is not None:
            value = penalty(cast(nn.Module, self.model), self.state.global_step)
            loss = loss + value.to(loss.device) / self.current_gradient_accumulation_steps
        return loss


def text_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Cross entropy of the next token, summed over the learnt ones of a micro-batch and divided by
    those of the whole step.

    Not left to the model: some take no count, or do not use it, so that a step would depend on how
    it is cut; so does the balance of routers that a config can have added.
    """
    size = outputs.logits.shape[-1]
    loss: Tensor = ForCausalLMLoss(outputs.logits, labels, size, num_items_in_batch)
    return loss


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Afterwards the model is in eval mode, on the device where it was, with nothing of the Trainer
    or accelerate on it.
    """
    device = next(model.parameters()).device
    before = dict(model.__dict__)
    config: Any = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    try:
        yield
    finally:
        for name in model.__dict__.keys() - before.keys():
            # accelerate marks the model, and mixed precision puts a forward of its own over it
            del model.__dict__[name]
        if "forward" in before:  # the one that moves tensors for a device_map
            model.__dict__["forward"] = before["forward"]
        if use_cache is not None:
            config.use_cache = use_cache
        if len(set(getattr(model, "hf_device_map", {}).values())) < 2:
            model.to(device)
        model.zero_grad()
        model.eval()
