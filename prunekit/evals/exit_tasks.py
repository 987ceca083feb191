"""What early exit saves on tasks, and what it costs there (AdaInfer, arXiv 2403.02181)."""

from __future__ import annotations

from typing import Any

from torch import nn

from prunekit.data.files import DataRoot
from prunekit.evals.exits import all_blocks, gate_of, leaving, oracle, saved
from prunekit.evals.lm_eval_tasks import Tasks, accuracies, run_tasks, tasks_at_hand
from prunekit.registry import Positive, Seed, evals


@evals.register(at_hand=tasks_at_hand)
def exit_tasks(
    model: nn.Module,
    tokenizer: Any,
    *,
    tasks: Tasks = ["docs_cloze"],  # noqa: B006  read only
    limit: Positive | None = None,
    batch: Positive = 1,
    bos: bool | None = None,
    seed: Seed = 0,
    data_root: DataRoot = None,
) -> dict[str, float]:
    """Accuracy where tokens leave early and where they pass all blocks, what leaving saves, and
    what an oracle would save; of a model without early exit both are the same.

    Keys: those of zeroshot, and of each task `acc_all_blocks_<task>` (or `acc_norm_`),
    `depth_<task>`, `blocks_saved_<task>`, `compute_saved_<task>` (as eval=early_exit has them) and
    `oracle_blocks_saved_<task>`, over all tokens of the requests. An oracle that lets each token go
    where it first has its prediction loses no accuracy.

    Args:
        tasks: of lm-eval, or docs_cloze, which needs no download.
        limit: the first so many items of each; null takes all.
        batch: requests at a time; of more than one, padding is counted as well.
        bos: BOS in front of each request; null is what lm-eval does for the model.
        seed: of examples in front of an item, where a task has them.
    """

    def ask(task: str) -> dict[str, Any]:
        found = run_tasks(
            model,
            tokenizer,
            [task],
            limit=limit,
            batch=batch,
            bos=bos,
            seed=seed,
            data_root=data_root,
        )
        results: dict[str, Any] = found["results"]
        return results

    gate = gate_of(model)
    results: dict[str, Any] = {}
    numbers: dict[str, float] = {}
    for task in dict.fromkeys(tasks):
        if gate is None:
            whole, best = ask(task), 0.0
            results |= whole
        else:
            with all_blocks(model, gate) as forwards:
                whole = ask(task)
            best = oracle(model, [first for _, first in forwards])
            with leaving(gate):
                results |= ask(task)
        [(key, value)] = [
            (k, v)
            for k, v in accuracies(whole, [task]).items()
            if k.endswith(f"_{task}") and not k.endswith("_stderr")
        ]
        numbers[f"{key.removesuffix(task)}all_blocks_{task}"] = value
        numbers |= {f"{k}_{task}": v for k, v in saved(model, gate).items()}
        numbers[f"oracle_blocks_saved_{task}"] = best
    return accuracies(results, tasks) | numbers
