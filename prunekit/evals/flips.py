"""Answers that flipped (Dutta et al., arXiv 2407.09141): two models of the same accuracy may be
right on different items.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.data.files import DataRoot
from prunekit.errors import ConfigError
from prunekit.evals.lm_eval_tasks import Tasks, accuracies, metric_of, run_tasks, tasks_at_hand
from prunekit.evals.paired import of_zeros_and_ones, paired
from prunekit.registry import Positive, Seed, evals
from prunekit.types import Dense


@evals.register(needs="dense", at_hand=tasks_at_hand)
def flips(
    model: nn.Module,
    tokenizer: Any,
    dense: Dense,
    *,
    tasks: Tasks = ["docs_cloze"],  # noqa: B006
    limit: Positive | None = None,
    batch: Positive = 8,
    bos: bool | None = None,
    seed: Seed = 0,
    data_root: DataRoot = None,
) -> dict[str, float]:
    """Items of multiple-choice tasks that the dense model and this one do not both get right or
    wrong, beside what eval=zeroshot reports.

    Keys: those of zeroshot, `flips_<task>`, `flips_to_wrong_<task>`, `flips_to_right_<task>`,
    `change_<task>` of the accuracy with its paired `_stderr`, `mcnemar_p_<task>`, and `flips_mean`
    over tasks.

    Args:
        tasks: of lm-eval, or docs_cloze, which needs no download.
        limit: the first so many items of each; null takes all.
        batch: requests at a time.
        bos: BOS in front of each request; null is what lm-eval does for the model.
        seed: of examples in front of an item, where a task has them.

    Raises ConfigError for a task whose items are not right or wrong.
    """
    own: list[dict[str, Any]] = []

    def ask(of: nn.Module) -> dict[str, Tensor]:
        found = run_tasks(
            of,
            tokenizer,
            tasks,
            limit=limit,
            batch=batch,
            bos=bos,
            seed=seed,
            data_root=data_root,
            items=True,
        )
        own.append(found)
        return {task: correct(found, task) for task in dict.fromkeys(tasks)}

    before = dense.remember("items", ask)
    if dense.itself and own:
        after, found = before, own[0]
    else:
        after = ask(model)
        found = own[-1]
    numbers = accuracies(found["results"], tasks)
    return numbers | flipped(before, after)


def flipped(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, float]:
    """`paired` of each task, and the mean share of flips."""
    found: dict[str, float] = {}
    shares = []
    for task, items in after.items():
        numbers = paired(before[task], items)
        shares.append(numbers["flips"])
        found[f"change_{task}_stderr"] = numbers.pop("change_stderr")
        found |= {f"{key}_{task}": value for key, value in numbers.items()}
    return found | {"flips_mean": sum(shares) / len(shares)}


def leaves(name: str, samples: Container[str], children: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks of a group that have items, its groups' tasks among them, each once; of a task
    itself.
    """
    if name in samples:
        return [name]
    below = (leaf for child in children.get(name, []) for leaf in leaves(child, samples, children))
    return list(dict.fromkeys(below))


def correct(found: dict[str, Any], task: str) -> Tensor:
    """(N,) 0 or 1 for each item of a task, or of all tasks of a group. Raises ConfigError where an
    item is neither.
    """
    samples = found["samples"]
    values: list[float] = []
    for name in leaves(task, samples, found.get("group_subtasks", {})):
        items = sorted(samples[name], key=lambda s: s["doc_id"])
        metric = metric_of(task, items[0].get("metrics", []))
        values += [float(s[metric]) for s in items if isinstance(s[metric], int | float)]
    right = of_zeros_and_ones(values) if values else None
    if right is None:
        raise ConfigError(f"eval=flips: the items of {task} are not right or wrong: take zeroshot")
    return right.to(torch.uint8)
