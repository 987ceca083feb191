"""Text for calibration, recovery and evaluation: from the interpreter, a local data folder, or the
hub.

A data folder (`data_root=` or `PRUNEKIT_DATA`) holds `wikitext2/test.txt`, `c4/*.jsonl` and
so on, see `SOURCES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from prunekit.data import pydocs
from prunekit.data.files import data_folder, is_records, read
from prunekit.errors import ConfigError, in_short

Dataset = Literal["pydocs", "wikitext2", "ptb", "c4", "bookcorpus", "alpaca", "dailydialog"]
Use = Literal["calibrate", "recover", "evaluate"]


@dataclass(frozen=True)
class Source:
    """Where a data set is: files under the data folder by split, arguments of
    `datasets.load_dataset`, and what its rows hold.
    """

    local: dict[str, str]
    hub: dict[str, Any]
    column: str
    evaluate: str
    hub_splits: dict[str, dict[str, Any]] = field(default_factory=dict)


C4 = "en/c4-{}.json.gz"
# the branch the hub makes of data sets that are scripts, which datasets >= 4 does not run
PARQUET = "refs/convert/parquet"
SOURCES = {
    "wikitext2": Source(
        {s: f"wikitext2/{s}.txt" for s in ("train", "validation", "test")},
        {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"},
        "text",
        "test",
    ),
    # LLM-Pruner's tables report PTB's validation split
    "ptb": Source(
        {s: f"ptb/{s}.txt" for s in ("train", "validation", "test")},
        {"path": "ptb-text-only/ptb_text_only", "name": "penn_treebank", "revision": PARQUET},
        "sentence",
        "validation",
    ),
    "c4": Source(
        {"train": "c4/*.jsonl", "validation": "c4/*.jsonl"},
        {"path": "allenai/c4"},
        "text",
        "validation",
        {
            "train": {"data_files": {"train": C4.format("train.00000-of-01024")}},
            "validation": {"data_files": {"validation": C4.format("validation.00000-of-00008")}},
        },
    ),
    "bookcorpus": Source(
        {"train": "bookcorpus/*.txt"},
        {"path": "bookcorpus/bookcorpus", "revision": PARQUET},
        "text",
        "train",
    ),
    "alpaca": Source(
        {"train": "alpaca/train.jsonl"}, {"path": "yahma/alpaca-cleaned"}, "instruction", "train"
    ),
    "dailydialog": Source(
        {s: f"dailydialog/{s}.jsonl" for s in ("train", "validation", "test")},
        {"path": "li2017dailydialog/daily_dialog", "revision": PARQUET},
        "dialog",
        "validation",
    ),
}

FIELDS: dict[str, dict[str, Any]] = {
    "alpaca": {"fields": ("instruction", "output"), "optional": ("input",)},
    "dailydialog": {"fields": (), "lists": ("dialog",)},
}
"""What a record of a local file must have; where nothing is said, `text`."""


def default_split(dataset: str, use: Use) -> str:
    """The split that `use` takes by default. Of bookcorpus and alpaca, which have no other, it is
    `train` for all uses; of the rest no text is both learnt from and tested on.
    """
    if dataset == "pydocs":
        return {"calibrate": "calibration", "recover": "recovery", "evaluate": "test"}[use]
    return SOURCES[dataset].evaluate if use == "evaluate" else "train"


def check_split(dataset: str, split: str) -> None:
    """Raises ConfigError for an unknown data set or split, naming what there is."""
    there = {"pydocs": pydocs.SPLITS} | {name: tuple(s.local) for name, s in SOURCES.items()}
    if dataset not in there:
        raise ConfigError(f"no data set called {dataset!r}; there are: {', '.join(there)}")
    if split not in there[dataset]:
        raise ConfigError(
            f"{dataset} has no split {split!r}; there are: {', '.join(there[dataset])}"
        )


def _local(dataset: str, split: str, folder: Path) -> list[dict[str, Any]]:
    """Records from the data folder, in the form the hub gives them; empty where the folder does not
    have the file.
    """
    source = SOURCES[dataset]
    files = sorted(folder.glob(source.local[split]))
    records = [record for file in files for record in read(file, **FIELDS.get(dataset, {}))]
    if dataset == "wikitext2":  # the hub's rows are lines with their end, blank ones empty
        return [{"text": r["text"] if r["text"].strip() else ""} for r in records]
    if dataset == "c4" and records:
        # One sample serves both splits: its last third is kept for evaluation.
        cut = len(records) * 2 // 3
        return records[:cut] if split == "train" else records[cut:]
    if files and files[0].suffix == ".txt":
        return [{source.column: r["text"].strip()} for r in records]
    return records


def records(dataset: str, split: str, data_root: str | None = None) -> Sequence[dict[str, Any]]:
    """Rows of a data set with all their fields, from the data folder if it has them, else from the
    hub.

    Raises ConfigError naming both ways where neither has them.
    """
    check_split(dataset, split)
    if dataset == "pydocs":
        return [{"text": paragraph} for paragraph in pydocs.paragraphs(split)]
    folder = data_folder(data_root)
    if folder and (found := _local(dataset, split, folder)):
        return found
    from datasets import load_dataset

    ask = partial(load_dataset, split=split)
    rows: Sequence[dict[str, Any]] = _from_hub(ask, dataset, split, folder)
    return rows


def check_there(
    dataset: str,
    split: str | None,
    use: Use,
    data_root: str | None,
) -> None:
    """Raises ConfigError where neither the data folder nor the hub has a data set, in the split
    that `use` takes if none is named; nothing of it is read.
    """
    split = split or default_split(dataset, use)
    check_split(dataset, split)
    folder = data_folder(data_root)
    if dataset == "pydocs" or (folder and any(folder.glob(SOURCES[dataset].local[split]))):
        return
    from datasets import load_dataset_builder

    _from_hub(load_dataset_builder, dataset, split, folder)


def _from_hub(ask: Callable[..., Any], dataset: str, split: str, folder: Path | None) -> Any:
    """What `ask` of the library `datasets` gives. Raises ConfigError."""
    source = SOURCES[dataset]
    asked = source.hub | source.hub_splits.get(split, {})
    try:
        return ask(**asked)
    except (OSError, ValueError, RuntimeError) as e:
        file = source.local[split]
        place = f"{folder}/{file} is not there" if folder else "no data folder is named"
        raise ConfigError(
            f"{dataset} ({split}): {place}, and the hub did not give {source.hub['path']} "
            f"({in_short(e)}). "
            f"Either name a folder that holds {file} with data_root= or PRUNEKIT_DATA, or run "
            "with the network on."
        ) from e


def texts(dataset: str, split: str, data_root: str | None = None) -> Sequence[str]:
    """Rows of a data set as text: an Alpaca record's fields or a dialogue's turns stand on lines of
    their own. Raises ConfigError.
    """
    rows = records(dataset, split, data_root)
    if dataset == "alpaca":
        fields = ("instruction", "input", "output")
        return ["\n".join(r[k] for k in fields if r.get(k)) for r in rows]
    if dataset == "dailydialog":
        return ["\n".join(turn.strip() for turn in r["dialog"]) for r in rows]
    key = "text" if dataset == "pydocs" else SOURCES[dataset].column
    return [r[key] for r in rows] if isinstance(rows, list) else rows[key]  # type: ignore[call-overload]


def document(rows: Sequence[str]) -> str:
    """All rows as one text with blank lines between them, LLM-Pruner's form for perplexity."""
    return "\n\n".join(rows)


def evaluation_text(
    dataset: str | None, split: str | None, path: str | None, data_root: str | None = None
) -> str:
    """A text to be tested on, as one string: the file `path`, else the data set, in the split kept
    for evaluation unless another is named. Raises ConfigError.
    """
    if path:
        rows = [r["text"] for r in read(path)]
        return document(rows) if is_records(path) else "".join(rows)
    if dataset is None:
        raise ConfigError("a text is either a dataset or a path")
    return document(texts(dataset, split or default_split(dataset, "evaluate"), data_root))
