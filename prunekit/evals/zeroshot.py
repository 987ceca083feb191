"""Zero-shot accuracy by lm-evaluation-harness: the seven tasks of LLM-Pruner (arXiv 2305.11627,
Table 1) or any other.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator
from torch import nn

from prunekit.data.files import DataRoot
from prunekit.evals.lm_eval_tasks import PAPER, accuracies, known_tasks, run_tasks
from prunekit.registry import Positive, Seed, evals


@evals.register()
def zeroshot(
    model: nn.Module,
    tokenizer: Any,
    *,
    tasks: Annotated[list[str], AfterValidator(known_tasks)] = list(PAPER),  # noqa: B006  read only
    limit: Positive | None = None,
    batch: Positive = 8,
    bos: bool | None = None,
    seed: Seed = 0,
    data_root: DataRoot = None,
) -> dict[str, float]:
    """Zero-shot accuracy on lm-eval tasks (default: LLM-Pruner's seven) and on docs_cloze, which
    needs no download.

    Keys: `acc_<task>` or `acc_norm_<task>`, as the paper reports the task, the same with `_stderr`,
    and `acc_mean` over this eval's tasks. `limit` takes the first so many items of each. Raises
    ConfigError.
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
