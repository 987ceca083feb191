"""How far a training is, as tensors, and back: the same command goes on after it was cut off, to
the last bit.

The Trainer's own checkpoints are not used: they hold the whole model where updates of 1 % are
trained, and pickles. Its own way of going on is (the examples that were seen are skipped), with the
tensors and numbers from here.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback

from prunekit.training.callbacks import Best, Curve
from prunekit.training.recipe import Recipe, learnt_from

log = logging.getLogger("prunekit")

FACTS = "facts"
STATE_FILE = "trainer_state.json"


class Stateful(Protocol):
    """What changes as a training goes on, beside the parameters that it trains."""

    def state(self) -> dict[str, Tensor]:
        """After a step of the optimizer."""

    def go_on(self, state: Mapping[str, Tensor], examples: int) -> None:
        """As it was at `state`, when so many examples had been learnt from."""


class SavedTraining:
    """How far a training is: written to `recipe.progress` after a step, and read from there before
    the first one.

    beside: what else than the trained parameters changes, and is kept with them.
    """

    def __init__(self, recipe: Recipe, curve: Curve, best: Best, beside: Sequence[Stateful]):
        assert recipe.progress is not None
        self.progress, self.batch = recipe.progress, recipe.batch
        self.curve, self.best, self.beside = curve, best, beside
        self.found = dict(self.progress.read() or {})
        self.facts: dict[str, Any] = {}
        """All that is no tensor."""
        if self.found:
            self.facts = json.loads(self.found.pop(FACTS).numpy().tobytes())

    def write(self, trainer: Any) -> None:
        """After a step of the optimizer."""
        best, optimizer = self.best, inner(trainer.optimizer)
        tensors = {f"trained:{i}": p.detach() for i, p in enumerate(best.trained)}
        tensors |= {f"best:{i}": copy for i, copy in enumerate(best.copies)}
        state = optimizer.state_dict()
        for i, values in state["state"].items():
            tensors |= {f"optimizer:{i}:{k}": torch.as_tensor(v) for k, v in values.items()}
        tensors |= dict(random_states())
        for i, of in enumerate(self.beside):
            tensors |= {f"beside:{i}:{k}": v for k, v in of.state().items()}
        tensors["loss"] = trainer._tr_loss.detach()
        drawn: Any = np.random.get_state()
        scaler = trainer.accelerator.scaler
        facts = {
            "trainer": asdict(trainer.state),
            "groups": [rates(group) for group in state["param_groups"]],
            "schedule": trainer.lr_scheduler.state_dict(),
            "scale": scaler.state_dict() if scaler else None,
            "logged": trainer._globalstep_last_logged,
            "curve": self.curve.records,
            "best": [best.loss, best.step, best.waited],
            "python": random.getstate(),
            "numpy": [drawn[0], drawn[1].tolist(), *drawn[2:]],
        }
        tensors[FACTS] = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)
        self.progress.write(tensors)

    def trainer_folder(self, where: str) -> str | None:
        """`where`, with the file in which the Trainer looks up how many steps are done; None for a
        training that begins.
        """
        if not self.found:
            return None
        Path(where, STATE_FILE).write_text(json.dumps(self.facts["trainer"]))
        return where

    @torch.no_grad()
    def restore_weights(self) -> None:
        """The trained parameters, the best ones so far, and the curve."""
        best = self.best
        for i, parameter in enumerate(best.trained):
            parameter.copy_(self.found[f"trained:{i}"])
        best.loss, best.step, best.waited = self.facts["best"]
        best.copies = [self.found[f"best:{i}"] for i in range(len(self.under("best:")))]
        self.curve.records[:] = self.facts["curve"]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """What was kept under names that begin with `prefix`, by the rest of them."""
        return {k.removeprefix(prefix): v for k, v in self.found.items() if k.startswith(prefix)}

    def restore_optimizer(self, trainer: Any) -> None:
        """Its moments, and the rates of the schedule."""
        optimizer = inner(trainer.optimizer)
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in self.under("optimizer:").items():
            index, _, key = name.partition(":")
            state.setdefault(int(index), {})[key] = value
        groups = optimizer.state_dict()["param_groups"]
        told = [own | kept for own, kept in zip(groups, self.facts["groups"], strict=True)]
        optimizer.load_state_dict({"state": state, "param_groups": told})
        trainer.lr_scheduler.load_state_dict(self.facts["schedule"])

    def restore_scale(self, trainer: Any) -> None:
        """By what losses are multiplied in mixed float16, which grows and falls with the steps."""
        if trainer.accelerator.scaler:
            trainer.accelerator.scaler.load_state_dict(self.facts["scale"])

    def restore_generators(self) -> None:
        """Every generator of random numbers, of the GPUs that are here: a job may go on where there
        are fewer. It comes last, so the tensors go.
        """
        version, keys, gauss = self.facts["python"]
        random.setstate((version, tuple(keys), gauss))
        np.random.set_state(tuple(self.facts["numpy"]))
        torch.set_rng_state(self.found["random:cpu"].cpu())
        for i in range(min(len(self.under("random:cuda:")), torch.cuda.device_count())):
            torch.cuda.set_rng_state(self.found[f"random:cuda:{i}"].cpu(), i)
        self.found.clear()

    def restore_rest(self, trainer: Any, examples: int) -> None:
        """The losses since they were logged last, and what is `beside`, when so many examples had
        been learnt from.
        """
        trainer._tr_loss = self.found["loss"].to(trainer.args.device)
        trainer._globalstep_last_logged = self.facts["logged"]
        for i, of in enumerate(self.beside):
            of.go_on(self.under(f"beside:{i}:"), examples)


def inner(optimizer: Any) -> Any:
    """The optimizer that accelerate wraps."""
    return getattr(optimizer, "optimizer", optimizer)


def rates(group: dict[str, Any]) -> dict[str, Any]:
    """What an optimizer knows of a group beside its parameters."""
    return {k: v for k, v in group.items() if k != "params"}


def random_states() -> Iterator[tuple[str, Tensor]]:
    """torch's, of every device."""
    yield "random:cpu", torch.get_rng_state()
    if torch.cuda.is_available():
        for i, state in enumerate(torch.cuda.get_rng_state_all()):
            yield f"random:cuda:{i}", state


class Beginning(TrainerCallback):
    """Restores what the Trainer resets as it begins, before the first examples are read."""

    def __init__(self, saved: SavedTraining, trainer: Any):
        self.saved, self.trainer = saved, trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.saved.found:
            log.info("training goes on from step %d", state.global_step)
            of = len(self.trainer.train_dataset)
            learnt = learnt_from(state.global_step, of, self.saved.batch)
            self.saved.restore_rest(self.trainer, learnt)
