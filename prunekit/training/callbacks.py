"""What happens beside the steps of a training: records, the best parameters, the bar."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import TrainerCallback

log = logging.getLogger("prunekit")

RECORDED = ("loss", "eval_loss", "learning_rate", "grad_norm")


class Curve(TrainerCallback):
    """What is logged, as records of a step: loss, eval_loss, learning_rate, grad_norm. Infinities
    and NaNs become None.
    """

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        values = {k: float(v) for k, v in (logs or {}).items() if k in RECORDED}
        bad = [k for k, v in values.items() if not math.isfinite(v)]
        if "loss" in bad and state.is_world_process_zero:
            log.warning(
                "step %d: the training loss is %s; a lower lr or another dtype may help",
                state.global_step,
                values["loss"],
            )
        if values:
            finite = {k: None if k in bad else v for k, v in values.items()}
            self.records.append({"step": state.global_step, **finite})


class Best(TrainerCallback):
    """The trained parameters at the lowest validation loss so far, in host memory: nothing has to
    be written. The training ends after `patience` looks in a row that found no lower one.
    """

    def __init__(self, trained: Sequence[nn.Parameter], patience: int | None = None):
        self.trained, self.patience = trained, patience
        self.waited = 0
        self.loss = math.inf
        self.step: int | None = None
        self.copies: list[Tensor] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True  # the last step counts too, whatever eval_every is

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **_: Any
    ) -> None:
        loss = (metrics or {}).get("eval_loss", math.inf)
        if loss < self.loss:
            self.loss, self.step, self.waited = loss, state.global_step, 0
            self.copies = [p.detach().cpu().clone() for p in self.trained]
        else:
            self.waited += 1
        if self.patience is not None and self.waited >= self.patience:
            control.should_training_stop = True

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the best parameters back; without a finite loss those of the last step stay."""
        for parameter, value in zip(self.trained, self.copies, strict=bool(self.copies)):
            parameter.copy_(value)


class OutsideGradients(TrainerCallback):
    """Gradients of parameters outside of the model: averaged over the processes before a step, as
    the model's are, and dropped after it.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self.parameters = list(parameters)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for p in self.parameters:
                # One that this process did not reach takes part, or the others would wait for it.
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                torch.distributed.all_reduce(p.grad)
                p.grad /= torch.distributed.get_world_size()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for p in self.parameters:
            p.grad = None


class BeforeStep(TrainerCallback):
    """Something that is done before each step, with its number from 0 on."""

    def __init__(self, action: Callable[[int], None]):
        self.action = action

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.action(state.global_step)


class Bar(TrainerCallback):
    """A bar in steps with the losses in it. It moves with every micro-batch, since a step may take
    minutes.
    """

    FORMAT = "{l_bar}{bar}| {n:.0f}/{total} steps [{elapsed}<{remaining}{postfix}]"

    def __init__(self) -> None:
        self.bar: tqdm[Any] | None = None
        self.losses: dict[str, str] = {}
        self.evaluated = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc="training",
                bar_format=self.FORMAT,
                dynamic_ncols=True,
            )

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(1 / args.gradient_accumulation_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any
    ) -> None:
        self.evaluated += 1
        if self.bar is not None:
            self.bar.set_description(f"validation {self.evaluated}/{len(eval_dataloader)}")

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.evaluated = 0
        if self.bar is not None:
            self.bar.set_description("training")

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        if self.bar is not None:
            names = {"loss": "loss", "eval_loss": "validation"}
            found = logs or {}
            self.losses |= {new: f"{found[k]:.3f}" for k, new in names.items() if k in found}
            self.bar.set_postfix(self.losses)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
