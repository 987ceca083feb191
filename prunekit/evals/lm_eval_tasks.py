"""lm-evaluation-harness: its tasks by name, on local files where there are any, and what it
measures of a model.
"""

from __future__ import annotations

import logging
import math
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from difflib import get_close_matches
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator
from torch import nn
from tqdm import tqdm

from prunekit.architecture.modes import eval_mode
from prunekit.data import docs_cloze
from prunekit.data.files import data_folder
from prunekit.data.kept_prompt import kept_prompt
from prunekit.errors import ConfigError, in_short

PAPER = {
    "boolq": ("acc", "super_glue/boolq"),
    "piqa": ("acc", "piqa"),
    "hellaswag": ("acc_norm", "hellaswag"),
    "winogrande": ("acc", "winogrande"),
    "arc_easy": ("acc", "arc"),
    "arc_challenge": ("acc_norm", "arc"),
    "openbookqa": ("acc_norm", "openbookqa"),
}
"""The metric that the paper (LLM-Pruner) reports of each task, and the folder of lm-eval that
defines it.
"""
WRITTEN = {
    "gsm8k": ("gsm8k", {"test": "", "train": "_train"}),
    "ifeval": ("ifeval", {"train": ""}),
    "humaneval": ("humaneval", {"test": ""}),
}
"""Tasks whose answers are written: the folder of lm-eval that defines it, and what the file of each
of its splits is called in a data folder, behind the task's name.
"""
CLOZE = "docs_cloze"


def _tasks_folder() -> Path:
    spec = find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("eval=zeroshot needs the package lm-eval: pip install lm-eval")
    return Path(spec.submodule_search_locations[0]) / "tasks"


def known_tasks(tasks: list[str]) -> list[str]:
    """The names if all are tasks or groups of lm-eval. Raises ValueError; reads lm-eval's YAMLs as
    text, for its own index takes 8 s.
    """
    if not tasks:
        raise ValueError("name one task at least")
    strange = [t for t in tasks if t not in PAPER and t not in WRITTEN and t != CLOZE]
    if strange:
        named = re.compile(r"^[\"']?(?:task|group)[\"']?:[ \t]*[\"']?([^\s\"'#]+)", re.M)
        there = {
            name
            for file in _tasks_folder().rglob("*.yaml")
            for name in named.findall(file.read_text(encoding="utf-8"))
        }
        for task in strange:
            if task not in there:
                hint = f"the usual ones are: {', '.join([*PAPER, CLOZE])}"
                if near := get_close_matches(task, sorted(there | {CLOZE}), n=4):
                    hint = f"near it are: {', '.join(near)}"
                raise ValueError(f"lm-eval has no task or group {task!r}; {hint}")
    return tasks


Tasks = Annotated[list[str], AfterValidator(known_tasks)]


@contextmanager
def quietly() -> Iterator[None]:
    """lm-eval's log and the bars of datasets off for a while, its own bars with units, Python's
    generator as it was afterwards.
    """
    import datasets

    log = logging.getLogger("lm_eval")
    level, bars, state = log.level, datasets.are_progress_bars_disabled(), random.getstate()
    log.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with _units():
            yield
    finally:
        log.setLevel(level)
        random.setstate(state)
        if not bars:
            datasets.enable_progress_bars()


@contextmanager
def _units() -> Iterator[None]:
    """Its bars say what they count, and go when they are full. lm-eval has no option for it."""
    from lm_eval.api import model, task
    from lm_eval.models import huggingface

    bars = {
        task: {"desc": "Building requests", "unit": "item"},
        model: {"unit": "input"},
        huggingface: {"unit": "request"},
    }
    try:
        for module, options in bars.items():
            vars(module)["tqdm"] = partial(tqdm, leave=False, **options)
        yield
    finally:
        for module in bars:
            vars(module)["tqdm"] = tqdm


def _spec(task: str, folder: Path | None) -> Any:
    """What lm-eval loads a task from: its stock definition, on the files of the data folder where
    that has them.

    lm-eval 0.4.13 takes a dict for a change of a stock task only inside a group.
    """
    if task == CLOZE:
        return docs_cloze.task()
    at = folder.resolve() / "tasks" if folder else None
    if at is None or task not in PAPER | WRITTEN or not (at / f"{task}.jsonl").is_file():
        return task
    changes: dict[str, Any] = {}
    if task in WRITTEN:
        files = {split: str(at / f"{task}{end}.jsonl") for split, end in WRITTEN[task][1].items()}
    else:
        main, other = (at / f"{task}{part}.jsonl" for part in ("", "_validation"))
        files = {"validation": str(main)}
        if other.is_file():
            files = {"validation": str(other), "test": str(main)}
        changes["training_split"] = None
    local = {
        "task": task,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
        **changes,
    }
    return {"group": f"local_{task}", "task": [local]}


def load_tasks(tasks: Sequence[str], folder: Path | None) -> Any:
    """lm-eval's task objects. Raises ConfigError where a data set is neither in the data folder nor
    on the hub.
    """
    from lm_eval.tasks import TaskManager

    at = _tasks_folder()
    folders = {t: f for t, (_, f) in PAPER.items()} | {t: f for t, (f, _) in WRITTEN.items()}
    if all(t in folders or t == CLOZE for t in tasks):  # the whole index takes 8 s
        manager = TaskManager(
            include_defaults=False,
            include_path=sorted({at / folders[t] for t in tasks if t in folders}),
        )
    else:
        manager = TaskManager()
    try:
        loaded = manager.load([_spec(task, folder) for task in dict.fromkeys(tasks)])
    except ImportError as e:
        raise ConfigError(
            f"tasks {', '.join(tasks)}: lm-eval needs another package ({e}); for ifeval: "
            "pip install lm-eval[ifeval]"
        ) from e
    except (OSError, ValueError, RuntimeError) as e:
        place = f"{folder} does not hold them" if folder else "no data folder is named"
        raise ConfigError(
            f"tasks {', '.join(tasks)}: {place}, and the hub did not give them all "
            f"({in_short(e)}). "
            "Either name a folder that holds tasks/<task>.jsonl with data_root= or "
            "PRUNEKIT_DATA, or run with the network on; "
            f"{CLOZE} needs neither."
        ) from e
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return loaded


def tasks_at_hand(*, tasks: Sequence[str], data_root: str | None, **_: Any) -> None:
    """Raises ConfigError where a data set of a task is neither in the data folder nor on the hub;
    it is there for the evals afterwards.
    """
    with quietly():
        load_tasks(tasks, data_folder(data_root))


def run_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None,
    batch: int,
    bos: bool | None,
    seed: int,
    data_root: str | None,
    items: bool = False,
    run_code: bool = False,
) -> dict[str, Any]:
    """What lm-eval finds: `results` by task and, with `items`, `samples`, a list for each task. The
    first `limit` items of each are taken; a prompt that a pruner left with the model stands before
    each; `run_code` lets tasks run what the model writes. Raises ConfigError where a data set is
    not to be had.
    """
    with quietly(), eval_mode(model):
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        loaded = load_tasks(tasks, data_folder(data_root))
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(seed=seed)
        # a copy, since lm-eval gives a tokenizer without padding a padding token
        lm = HFLM(
            pretrained=model,
            tokenizer=deepcopy(tokenizer),
            batch_size=batch,
            add_bos_token=bos,
            softmax_dtype="float32",
        )
        found: dict[str, Any] = evaluate(
            lm,
            loaded,
            limit=limit,
            log_samples=items,
            system_instruction=kept_prompt(model) or None,
            confirm_run_unsafe_code=run_code,
        )
    return found


def metric_of(task: str, values: Sequence[str]) -> str:
    """Which of the metrics that lm-eval gives of a task counts: the paper's, else accuracy, else
    the first.
    """
    if task in PAPER:
        return PAPER[task][0]
    return "acc" if "acc" in values else values[0]


def accuracies(results: dict[str, dict[str, Any]], tasks: Sequence[str]) -> dict[str, float]:
    """The metric of each task, its error, and the mean of the accuracies."""
    found: dict[str, float] = {}
    values_found, errors = [], []
    for task in dict.fromkeys(tasks):
        values = {
            k.removesuffix(",none"): v
            for k, v in results[task].items()
            if isinstance(v, (int, float)) and "," in k
        }
        metric = metric_of(task, list(values))
        name, comma, how = metric.partition(",")  # a filter of answers stands behind a comma
        found[f"{name}_{task}"] = float(values[metric])
        error = float(values.get(f"{name}_stderr{comma}{how}", math.nan))
        if not math.isnan(error):
            found[f"{name}_{task}_stderr"] = error
        if metric.startswith("acc"):
            values_found.append(float(values[metric]))
            errors.append(error)
    if values_found:
        found["acc_mean"] = sum(values_found) / len(values_found)
        total = math.sqrt(sum(e * e for e in errors)) / len(errors)
        if not math.isnan(total):
            found["acc_mean_stderr"] = total
    return found
