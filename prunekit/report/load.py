"""Reads what the jobs left on disk: results, failures, and jobs that never finished."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Required,  # pydantic asks for it before Python 3.12
)

from pydantic import Field
from typing_extensions import TypedDict

from prunekit.errors import ConfigError

STAGES = ("dense", "pruned", "recovered")


@dataclass(frozen=True, eq=False)
class Result:
    """One finished job: `numbers["pruned"]["ppl_wikitext2_128"]`, and what else its result file
    says.
    """

    folder: Path
    config: dict[str, Any]
    numbers: dict[str, dict[str, float | None]]
    record: dict[str, Any]


Component = dict[str, Any]


class Step(TypedDict, total=False):
    """One entry of a recovery's curve."""

    step: int
    loss: float | None
    eval_loss: float | None


class Notes(TypedDict, total=False):
    recovery_curve: list[Step] | None


class Config(TypedDict, total=False):
    """What the report reads of a configuration."""

    model: Required[Component]
    ratio: Required[Component | None]
    criterion: Required[Component | None]
    table: str | None
    row: str | None


class Record(TypedDict, total=False):
    """What the report reads of a result file."""

    config: Required[Config]
    results: Required[dict[str, float | None]]
    kept: dict[str, Annotated[list[int], Field(min_length=2, max_length=2)]]
    importance: dict[str, dict[str, float]]
    notes: Notes
    not_finite: list[str] | None


@dataclass
class Found:
    """Everything under the given folders."""

    results: list[Result] = field(default_factory=list)
    failed: dict[Path, str] = field(default_factory=dict)
    unfinished: list[Path] = field(default_factory=list)


def load(folders: Iterable[str | Path]) -> Found:
    """Every job below `folders`, each once, in the order of their paths. Raises ConfigError where a
    folder is missing.
    """
    found = Found()
    seen: set[Path] = set()
    for top in map(Path, folders):
        if not top.is_dir():
            raise ConfigError(f"report: {top} is not a folder")
        for here, below, files in os.walk(top):
            below.sort(key=natural)
            folder = Path(here)
            if folder.resolve() not in seen and file_job(folder, set(files), below, found):
                seen.add(folder.resolve())
                below.clear()  # a job's own subfolders (checkpoint, wandb) hold no jobs
    return found


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts `a2` before `a10`."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)
    ]


def file_job(folder: Path, files: set[str], below: list[str], found: Found) -> bool:
    """Files the job in `folder`, if it is one. A failure that lies beside an older result counts:
    the result is not of that run. A result that cannot be read is a failure that names the file.
    """
    if "failed.txt" in files:
        found.failed[folder] = reason(folder / "failed.txt")
    elif "result.json" in files:
        try:
            found.results.append(read(folder / "result.json"))
        except ConfigError as e:
            found.failed[folder] = str(e)
    elif "run.log" in files and (".hydra" in below or ".running" in files):
        found.unfinished.append(folder)
    else:
        return False
    return True


def reason(path: Path) -> str:
    """The line of a traceback that says what went wrong."""
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    heads = [
        line
        for line in lines
        if line[0] not in " \t" and not line.startswith(("Traceback", "During", "The above"))
    ]
    return (heads or lines or ["no reason given"])[-1][:300]


def read(path: Path) -> Result:
    """Raises ConfigError naming the file where it is not a result, and what in it is not as it
    should be.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        if not path.is_file():
            raise ConfigError(f"{path} is not a file")
        record = json.loads(path.read_text(encoding="utf-8"))
        TypeAdapter(Record).validate_python(record, strict=True)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"{path} is not a result file: {where or 'its content'}: {first['msg']}"
        ) from None
    except (ValueError, RecursionError, OSError) as e:
        if isinstance(e, ConfigError):
            raise
        raise ConfigError(f"{path} is not a result file ({type(e).__name__}: {e})") from None
    numbers: dict[str, dict[str, float | None]] = {}
    for key, value in record["results"].items():
        stage, _, metric = key.partition("/")
        numbers.setdefault(stage, {})[metric] = value
    return Result(path.parent, record["config"], numbers, record)
