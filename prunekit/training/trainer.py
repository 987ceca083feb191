"""Training of whatever requires gradients in a model, by transformers' Trainer: one process or
several, one device or many.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from prunekit.data.training_examples import Example, collate
from prunekit.errors import ConfigError

log = logging.getLogger(__name__)


class Curve(TrainerCallback):
    """What the Trainer logs, as records of a step: loss, eval_loss, learning_rate, grad_norm.
    Infinities and NaNs become None.
    """

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        kept = {
            k: float(v)
            for k, v in (logs or {}).items()
            if k in ("loss", "eval_loss", "learning_rate", "grad_norm")
        }
        bad = [k for k, v in kept.items() if not math.isfinite(v)]
        if "loss" in bad and state.is_world_process_zero:
            log.warning(
                "step %d: the training loss is %s; a lower lr or another dtype may help",
                state.global_step,
                kept["loss"],
            )
        if kept:
            self.records.append(
                {"step": state.global_step} | {k: None if k in bad else v for k, v in kept.items()}
            )


class Best(TrainerCallback):
    """The trained parameters at the lowest held-out loss so far, in memory: they are few, and
    nothing has to be written.
    """

    def __init__(self, model: nn.Module):
        self.trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.loss, self.step = math.inf, None  # type: float, int | None
        self.copy: dict[str, Tensor] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True  # the last step counts too, whatever eval_every is

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **_: Any
    ) -> None:
        loss = (metrics or {}).get("eval_loss", math.inf)
        if loss < self.loss:
            self.loss, self.step = loss, state.global_step
            self.copy = {n: p.detach().cpu().clone() for n, p in self.trained.items()}

    def restore(self) -> None:
        with torch.no_grad():
            for name, value in self.copy.items():
                self.trained[name].copy_(value)


class Bar(ProgressCallback):
    """The Trainer's bar with the loss in it, in place of a line on the terminal for
    every record.
    """

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        if self.training_bar is not None:
            self.training_bar.set_postfix(
                {
                    k: f"{float(v):.3f}"
                    for k, v in (logs or {}).items()
                    if k in ("loss", "eval_loss")
                }
            )


@dataclass(frozen=True)
class Recipe:
    """How to train: steps count optimizer steps, `batch` counts examples over all processes,
    `epochs` ends where `max_steps` does not.
    """

    lr: float
    warmup_steps: int
    epochs: float
    max_steps: int | None
    batch: int
    micro_batch: int
    eval_every: int
    log_every: int
    seed: int


def fit(
    model: nn.Module, train: list[Example], held: list[Example], recipe: Recipe
) -> tuple[list[dict[str, Any]], int | None]:
    """Trains in place; returns the loss curve and, with held-out examples, the step whose
    parameters were kept.

    AdamW without weight decay, linear decay after the warm-up. Mixed precision follows the weights:
    bfloat16 or (on an accelerator) float16 where the model is loaded in it. Leaves the model in
    eval mode on the device where it was, with nothing of the Trainer on it. Raises ConfigError if
    the batch cannot be made of micro-batches.
    """
    curve, best = Curve(), Best(model)
    device = next(model.parameters()).device
    before = dict(model.__dict__)
    config: Any = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=arguments(recipe, folder, dtype(model), device, evaluate=bool(held)),
            train_dataset=train,  # type: ignore[arg-type]  # a list has the length and the items that the Trainer asks for
            eval_dataset=held or None,  # type: ignore[arg-type]
            data_collator=collate,
        )
        trainer.remove_callback(ProgressCallback)
        for callback in (curve, Bar(), *([best] if held else [])):
            trainer.add_callback(callback)
        trainer.train()
    best.restore()
    for name in model.__dict__.keys() - before.keys():
        del model.__dict__[
            name
        ]  # accelerate marks the model, and mixed precision puts a forward of its own over it
    if "forward" in before:
        model.__dict__["forward"] = before["forward"]  # the one that moves tensors for a device_map
    if use_cache is not None:
        config.use_cache = use_cache
    if len(set(getattr(model, "hf_device_map", {}).values())) < 2:
        model.to(device)
    model.eval()
    return curve.records, best.step


def arguments(
    recipe: Recipe, folder: str, kind: torch.dtype, device: torch.device, *, evaluate: bool
) -> TrainingArguments:
    """The recipe in the Trainer's words: nothing is written, nothing reported, one device for each
    process.
    """
    args = TrainingArguments(
        output_dir=folder,
        learning_rate=recipe.lr,
        warmup_steps=recipe.warmup_steps,
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps or -1,
        per_device_train_batch_size=recipe.micro_batch,
        per_device_eval_batch_size=recipe.micro_batch,
        gradient_accumulation_steps=accumulation(recipe.batch, recipe.micro_batch),
        optim="adamw_torch",
        logging_steps=recipe.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=recipe.eval_every,
        prediction_loss_only=True,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=False,
        dataloader_pin_memory=device.type != "cpu",
        seed=recipe.seed,
        use_cpu=device.type == "cpu",
        bf16=kind is torch.bfloat16,
        fp16=kind is torch.float16
        and device.type != "cpu",  # the CPU has no mixed float16 and computes in the weights' own
    )
    if args.n_gpu > 1:
        # DataParallel would multiply the batch by the GPUs that happen to be there; several
        # processes are the way
        args._n_gpu = 1
    return args


def dtype(model: nn.Module) -> torch.dtype:
    """Of the frozen weights, or of all if none is frozen."""
    frozen = (p.dtype for p in model.parameters() if not p.requires_grad and p.is_floating_point())
    return next(frozen, next(model.parameters()).dtype)


def accumulation(batch: int, micro_batch: int) -> int:
    """Micro-batches of one process in one step, so that a step has `batch` examples over all
    processes.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if batch % (micro_batch * processes):
        over = f" x {processes} processes" if processes > 1 else ""
        raise ConfigError(f"batch={batch} is no multiple of micro_batch={micro_batch}{over}")
    return batch // (micro_batch * processes)
