"""Text for calibration, recovery and evaluation: from the interpreter, a local data folder, or the
hub.

A data folder (`data_root=` or `PRUNEKIT_DATA`) holds `wikitext2/test.txt`, `c4/c4_demo.jsonl` and
so on, see `SOURCES`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator
from torch import Tensor

from prunekit.errors import ConfigError

Dataset = Literal["pydocs", "wikitext2", "ptb", "c4", "bookcorpus", "alpaca", "dailydialog"]

PYDOCS_TEST = (
    "compound",
    "formatstrings",
    "execmodel",
    "import",
    "dict",
    "context-managers",
    "sequence-types",
)
PYDOCS_CALIBRATION = (
    "string-methods",
    "typesmapping",
    "assignment",
    "comparisons",
    "strings",
    "objects",
    "numeric-types",
)
"""Topics of each part by name, so that a patch release of Python that adds or edits a topic moves
no other; recovery has the rest.
"""
PYDOCS_SPLITS = ("calibration", "recovery", "test")


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
        {"train": "c4/c4_demo.jsonl", "validation": "c4/c4_demo.jsonl"},
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


def default_split(dataset: str, use: Literal["calibrate", "recover", "evaluate"]) -> str:
    """The split that `use` takes by default: they differ, so that no text is both learnt from and
    tested on.
    """
    if dataset == "pydocs":
        return {"calibrate": "calibration", "recover": "recovery", "evaluate": "test"}[use]
    return SOURCES[dataset].evaluate if use == "evaluate" else "train"


def _prose(text: str) -> list[str]:
    """Paragraphs of plain English, one line each: no code, grammar, headings, or notes on versions,
    which patch releases change.
    """
    found = []
    for block in re.split(r"\n\s*\n", text):
        words = block.split()
        line = " ".join(words)
        letters = sum(c.isalpha() or c == " " for c in line)
        if (
            len(words) < 8
            or line[-1] not in ".:;)"
            or letters < 0.8 * len(line)
            or ">>>" in line
            or "::=" in line
        ):
            continue
        if not re.search(r"(Changed|New|Added|Removed|Deprecated since) (in )?version", line):
            found.append(line)
    return found


def _pydocs(split: str) -> list[str]:
    """Paragraphs of one part of Python's own reference; topics quote each other: a paragraph
    belongs to the first part that has it.
    """
    from pydoc_data.topics import topics

    if split not in PYDOCS_SPLITS:
        raise ConfigError(f"pydocs has no split {split!r}; there are: {', '.join(PYDOCS_SPLITS)}")
    named = PYDOCS_TEST + PYDOCS_CALIBRATION
    parts = {
        "test": PYDOCS_TEST,
        "calibration": PYDOCS_CALIBRATION,
        "recovery": tuple(t for t in sorted(topics) if t not in named),
    }
    owner: dict[str, str] = {}
    for part, names in parts.items():
        for name in names:
            for paragraph in _prose(topics.get(name, "")):
                owner.setdefault(paragraph, part)
    return [paragraph for paragraph, part in owner.items() if part == split]


def read(path: str | Path) -> list[dict[str, Any]]:
    """Records of a .jsonl file, or the lines of any other file under the key `text` (line ends
    kept). Raises ConfigError.
    """
    _file(str(path))
    path = Path(path).expanduser()
    with path.open(encoding="utf-8") as lines:
        if path.suffix != ".jsonl":
            return [{"text": line} for line in lines]
        try:
            return [json.loads(line) for line in lines if line.strip()]
        except json.JSONDecodeError as e:
            raise ConfigError(f"{path} holds a line that is not JSON: {e}") from e


def _file(path: str | None) -> str | None:
    if path is not None and not Path(path).expanduser().is_file():
        raise ConfigError(
            f"{path} is not a file; a .jsonl file with one record a line, or plain text, is needed"
        )
    return path


def data_folder(data_root: str | None) -> Path | None:
    """The folder of local data: the option, else `PRUNEKIT_DATA`, else none. Raises ConfigError if
    it is named and missing.
    """
    named = data_root or os.environ.get("PRUNEKIT_DATA")
    if not named:
        return None
    if not Path(named).expanduser().is_dir():
        raise ConfigError(
            f"data_root={named!r} is not a folder (option data_root or environment variable "
            "PRUNEKIT_DATA)"
        )
    return Path(named).expanduser()


def _folder(data_root: str | None) -> str | None:
    data_folder(data_root)
    return data_root


TextFile = Annotated[str, AfterValidator(_file)]
"""Type of an option that names a text or jsonl file; a missing one is found before a weight is
read.
"""
DataRoot = Annotated[str | None, AfterValidator(_folder)]
"""Type of the option `data_root`."""


def _local(dataset: str, split: str, folder: Path) -> list[dict[str, Any]]:
    """Records from the data folder, in the form the hub gives them; empty where the folder does not
    have the file.
    """
    source = SOURCES[dataset]
    files = sorted(folder.glob(source.local[split]))
    records = [record for file in files for record in read(file)]
    if dataset == "wikitext2":  # the hub's rows are lines with their end, blank ones empty
        return [{"text": r["text"] if r["text"].strip() else ""} for r in records]
    if (
        dataset == "c4" and records
    ):  # one sample serves both splits: its last third is kept for evaluation
        cut = len(records) * 2 // 3
        return records[:cut] if split == "train" else records[cut:]
    return (
        [{source.column: r["text"].strip()} for r in records]
        if files and files[0].suffix == ".txt"
        else records
    )


def records(dataset: str, split: str, data_root: str | None = None) -> Sequence[dict[str, Any]]:
    """Rows of a data set with all their fields, from the data folder if it has them, else from the
    hub.

    Raises ConfigError naming both ways where neither has them.
    """
    if dataset == "pydocs":
        return [{"text": paragraph} for paragraph in _pydocs(split)]
    if dataset not in SOURCES:
        raise ConfigError(
            f"no data set called {dataset!r}; there are: pydocs, {', '.join(SOURCES)}"
        )
    if split not in SOURCES[dataset].local:
        raise ConfigError(
            f"{dataset} has no split {split!r}; there are: {', '.join(SOURCES[dataset].local)}"
        )
    folder = data_folder(data_root)
    if folder and (found := _local(dataset, split, folder)):
        return found
    from datasets import load_dataset

    source = SOURCES[dataset]
    try:
        return load_dataset(**{**source.hub, **source.hub_splits.get(split, {})}, split=split)
    except (OSError, ValueError, RuntimeError) as e:
        file = source.local[split]
        place = f"{folder}/{file} is not there" if folder else "no data folder is named"
        raise ConfigError(
            f"{dataset} ({split}): {place}, and the hub did not give {source.hub['path']} "
            f"({type(e).__name__}: {str(e).splitlines()[0]}). "
            f"Either name a folder that holds {file} with data_root= or PRUNEKIT_DATA, or run "
            "with the network on."
        ) from e


def texts(dataset: str, split: str, data_root: str | None = None) -> Sequence[str]:
    """Rows of a data set as text: an Alpaca record's fields or a dialogue's turns stand on lines of
    their own. Raises ConfigError.
    """
    rows = records(dataset, split, data_root)
    if dataset == "alpaca":
        return ["\n".join(r[k] for k in ("instruction", "input", "output") if r[k]) for r in rows]
    if dataset == "dailydialog":
        return ["\n".join(turn.strip() for turn in r["dialog"]) for r in rows]
    key = "text" if dataset == "pydocs" else SOURCES[dataset].column
    return [r[key] for r in rows] if isinstance(rows, list) else rows[key]  # type: ignore[call-overload]


def document(rows: Sequence[str]) -> str:
    """All rows as one text with blank lines between them, LLM-Pruner's form for perplexity."""
    return "\n\n".join(rows)


def crops(
    rows: Sequence[str],
    tokenizer: Any,
    *,
    samples: int,
    length: int,
    seed: int,
    join: bool,
    glue: str = "\n\n",
) -> Tensor:
    """LLM-Pruner's calibration draw: random rows, each used once and long enough, and a random
    stretch of each. `(N, T)` int64.

    `join` lets a row that is too short run on into the next ones. Special tokens are the
    tokenizer's default, as in the original. Raises ConfigError when the rows run out.
    """
    generator = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    drawn: list[Tensor] = []
    while len(drawn) < samples and len(seen) < len(rows):
        row = int(torch.randint(len(rows), (1,), generator=generator))
        if row in seen:
            continue
        seen.add(row)
        ids = _ids(rows, row, tokenizer, length, join, glue)
        if len(ids) >= length:
            start = int(torch.randint(len(ids) - length + 1, (1,), generator=generator))
            drawn.append(torch.tensor(ids[start : start + length]))
    if len(drawn) < samples:
        hint = "" if join else ", or let rows run on into the next with join=true"
        raise ConfigError(
            f"asked for {samples} samples of {length} tokens, but only {len(drawn)} of the "
            f"{len(rows)} rows are long enough; "
            f"ask for fewer or shorter ones{hint}"
        )
    return torch.stack(drawn)


def _ids(
    rows: Sequence[str], row: int, tokenizer: Any, length: int, join: bool, glue: str
) -> list[int]:
    """Token ids of a row, with `join` of as many rows as give `length`; empty where the text cannot
    reach it.
    """
    text = rows[row]
    ahead = row + 1
    while True:
        # a token covers one byte at least (8 for what a tokenizer adds), so shorter text needs no
        # tokenizing
        ids = tokenizer(text).input_ids if len(text.encode()) + 8 >= length else []
        if len(ids) >= length or not join or ahead == len(rows):
            return ids
        text, ahead = text + glue + rows[ahead], ahead + 1
