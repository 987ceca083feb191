"""How a model is trained: rates, lengths, batches."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass

from prunekit.errors import ConfigError
from prunekit.types import Progress

log = logging.getLogger("prunekit")


@dataclass(frozen=True)
class Recipe:
    """Steps are optimizer steps; batches count examples over all processes.

    lr: learning rate after the warm-up; it falls linearly to 0 at the last step.
    epochs: passes over the examples; `max_steps` ends the training where it is not None.
    micro_batch: examples of one forward on each device.
    eval_every, log_every: steps between looks at the validation loss, and between records.
    save_every: steps after which `progress` is told how far the training is; a training that is
        told there how far an earlier one was goes on from there. Not of several processes.
    patience: looks in a row at which the validation loss is not below its lowest, after which the
        training ends; None goes through all steps.
    seed: draws the order of the examples, and dropout.
    """

    lr: float
    warmup_steps: int = 0
    epochs: float = 1
    max_steps: int | None = None
    batch: int = 8
    micro_batch: int = 1
    eval_every: int = 100
    log_every: int = 10
    save_every: int = 100
    progress: Progress | None = None
    patience: int | None = None
    seed: int = 0


def check_patience(patience: int | None, validation_size: int) -> None:
    """Raises ConfigError for patience with a loss that is not measured."""
    if patience is not None and not validation_size:
        raise ConfigError(
            f"patience={patience} is with the loss on examples set aside, and validation_size=0 "
            "sets none aside"
        )


def processes() -> int:
    """How many train together (torchrun, accelerate launch)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def micro_batches(batch: int, micro_batch: int) -> int:
    """Micro-batches of one process in one step, so that a step has `batch` examples over all
    processes. Raises ConfigError where they do not divide it.
    """
    of = processes()
    if batch % (micro_batch * of):
        over = f" x {of} processes" if of > 1 else ""
        raise ConfigError(f"batch={batch} is no multiple of micro_batch={micro_batch}{over}")
    return batch // (micro_batch * of)


def learnt_from(step: int, examples: int, batch: int) -> int:
    """How many examples a training has had after `step` steps: the last step of each pass over
    `examples` has what is left of them.
    """
    passes, rest = divmod(step, math.ceil(examples / batch))
    return passes * examples + rest * batch


def warn_of_warmup(warmup_steps: int, steps: int) -> None:
    """Warns of a training that ends before its learning rate is reached."""
    if warmup_steps >= max(steps, 1):
        log.warning(
            "the learning rate is not reached: %d steps, of which warmup_steps=%d are the warm-up; "
            "give warmup_steps=%d or so",
            steps,
            warmup_steps,
            steps // 10,
        )


def linear_decay(step: int, warmup_steps: int, steps: int) -> float:
    """Factor of the learning rate in a step: from 0 to 1 during the warm-up, then down to 0."""
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    return max(0.0, (steps - step) / max(1, steps - warmup_steps))
