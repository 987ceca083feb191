"""Zero-shot accuracy by lm-evaluation-harness: the seven tasks of LLM-Pruner (arXiv 2305.11627,
Table 1) or any other.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from prunekit.data.files import DataRoot
from prunekit.evals.lm_eval_tasks import PAPER, Tasks, accuracies, run_tasks, tasks_at_hand
from prunekit.registry import Positive, Seed, evals


@evals.register(at_hand=tasks_at_hand)
def zeroshot(
    model: nn.Module,
    tokenizer: Any,
    *,
    tasks: Tasks = list(PAPER),  # noqa: B006  read only
    limit: Positive | None = None,
    batch: Positive = 8,
    bos: bool | None = None,
    seed: Seed = 0,
    data_root: DataRoot = None,
) -> dict[str, float]:
    """Zero-shot accuracy on lm-eval tasks (default: LLM-Pruner's seven) and on docs_cloze, which
    needs no download.

    Keys: `acc_<task>` or `acc_norm_<task>`, as the paper reports the task, the same with `_stderr`,
    and `acc_mean` over this eval's tasks.

    Args:
        tasks: of lm-eval, or docs_cloze.
        limit: the first so many items of each; null takes all.
        batch: requests at a time.
        bos: BOS in front of each request; null is what lm-eval does for the model.
        seed: of examples in front of an item, where a task has them.

    Raises ConfigError where a data set is not to be had.
    """
    found = run_tasks(
        model,
        tokenizer,
        tasks,
        limit=limit,
        batch=batch,
        bos=bos,
        seed=seed,
        data_root=data_root,
    )
    return accuracies(found["results"], tasks)
