"""Tasks whose answers are written, not chosen, through lm-evaluation-harness: what LLM-KICK (arXiv
2310.01382) and its followers found to break before perplexity does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from prunekit.data.files import DataRoot
from prunekit.errors import ConfigError
from prunekit.evals.lm_eval_tasks import Tasks, accuracies, run_tasks, tasks_at_hand
from prunekit.registry import Component, Positive, Seed, evals

SWITCH = "HF_ALLOW_CODE_EVAL"
"""How the package that runs HumanEval's answers is told that it may."""


def check_kick_tasks(_: Component, *, tasks: list[str], run_code: bool, **__: Any) -> None:
    """Raises ConfigError for a task that runs what the model writes unless that is allowed."""
    if "humaneval" in tasks and not run_code:
        raise ConfigError(
            "eval=kick_tasks: humaneval runs the code that the model writes. Allow it with "
            "run_code=true, in a container at best, or leave it out of tasks"
        )


def kick_at_hand(*, run_code: bool, **options: Any) -> None:
    """`tasks_at_hand`, for tasks that load only where code may run as well."""
    with allowed(run_code):
        tasks_at_hand(**options)


@evals.register(check=check_kick_tasks, at_hand=kick_at_hand)
def kick_tasks(
    model: nn.Module,
    tokenizer: Any,
    *,
    tasks: Tasks = ["gsm8k", "ifeval", "mmlu"],  # noqa: B006  read only
    limit: Positive | None = None,
    batch: Positive = 8,
    bos: bool | None = None,
    run_code: bool = False,
    seed: Seed = 0,
    data_root: DataRoot = None,
) -> dict[str, float]:
    """GSM8K, IFEval, MMLU and, with `run_code`, HumanEval, by lm-eval's own definitions: prompts,
    examples in front, filters and metrics. Data sets come from the data folder
    (`tasks/<task>.jsonl`, `tasks/gsm8k_train.jsonl`) or the hub, and are looked for before a weight
    is read.

    Keys: `<metric>_<task>`, the first metric that lm-eval gives of a task, with its `_stderr`.

    Args:
        tasks: any of lm-eval's.
        limit: the first so many items of each; null takes all.
        batch: requests at a time.
        bos: BOS in front of each request; null is what lm-eval does for the model.
        run_code: lets humaneval run what the model writes, on this machine.
        seed: of examples in front of an item.

    Raises ConfigError where a data set is not to be had.
    """
    with allowed(run_code):
        found = run_tasks(
            model,
            tokenizer,
            tasks,
            limit=limit,
            batch=batch,
            bos=bos,
            seed=seed,
            data_root=data_root,
            run_code=run_code,
        )
    return accuracies(found["results"], tasks)


@contextmanager
def allowed(run_code: bool) -> Iterator[None]:
    """The package `evaluate` may run code for a while, if `run_code`."""
    before = os.environ.get(SWITCH)
    if run_code:
        os.environ[SWITCH] = "1"
    try:
        yield
    finally:
        os.environ.pop(SWITCH, None)
        if before is not None:
            os.environ[SWITCH] = before
