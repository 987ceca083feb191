"""Text files of the user's own, the folder of local data, and that of what is kept."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator

from prunekit.errors import ConfigError, expanded

WIDE = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
"""How a file begins that is in an encoding of two bytes."""


def cache_folder() -> Path:
    """`PRUNEKIT_CACHE`, default `~/.cache/prunekit`. Raises ConfigError where there is no home."""
    return expanded(os.environ.get("PRUNEKIT_CACHE") or "~/.cache/prunekit")


def cache_limit() -> int:
    """Bytes that the cache keeps: `PRUNEKIT_CACHE_GIB`, default 2. Raises ConfigError."""
    given = os.environ.get("PRUNEKIT_CACHE_GIB") or "2"
    try:
        limit = int(float(given) * 2**30)
    except (ValueError, OverflowError):
        limit = 0
    if limit <= 0:
        raise ConfigError(f"PRUNEKIT_CACHE_GIB={given}: it is a number of GiB, above 0")
    return limit


def is_records(path: str | Path) -> bool:
    """Whether a file's name says that it holds a JSON record a line."""
    return Path(path).suffix.lower() == ".jsonl"


def existing_file(path: str) -> str:
    """`path`, if it names a file, and not one of JSON, which would be read as plain text. Raises
    ConfigError.
    """
    try:
        found = Path(path).expanduser().is_file()
    except (ValueError, RuntimeError, OSError):  # a NUL, a home that there is not, a long name
        found = False
    if not found:
        raise ConfigError(
            f"{path} is not a file; a .jsonl file with one record a line, or plain text, is needed"
        )
    if Path(path).suffix.lower() == ".json":
        raise ConfigError(
            f"{path} is neither plain text nor .jsonl: one record a line is needed, under a name "
            "that ends in .jsonl"
        )
    return path


def read(
    path: str | Path,
    fields: tuple[str, ...] = ("text",),
    *,
    optional: tuple[str, ...] = (),
    lists: tuple[str, ...] = (),
) -> list[dict[str, Any]]:
    """Records of a .jsonl file, or the lines of any other file under the key `text` (line ends
    kept).

    Every record has a string under each of `fields`, a string, null or nothing under the `optional`
    ones, and strings in a list under each of `lists`. Raises ConfigError naming the file, the line
    and what was expected.
    """
    path = Path(existing_file(str(path))).expanduser()
    if not is_records(path):
        if fields != ("text",):
            raise ConfigError(f"{path} is plain text, whose lines have no field but 'text'")
        found = [{"text": line} for _, line in lines_of(path)]
    else:
        found = [
            record_of(line, f"{path}, line {i}", fields, optional, lists)
            for i, line in lines_of(path)
            if line.strip()
        ]
    if not any(str(value).strip() for record in found for value in record.values()):
        raise ConfigError(f"{path} holds no text")
    return found


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line. Raises ConfigError for what is not text in UTF-8."""
    try:
        with path.open("rb") as file:
            for i, line in enumerate(file, 1):
                if i == 1 and line[:2] in WIDE:
                    raise ConfigError(f"{path} is {WIDE[line[:2]]}; text in UTF-8 is needed")
                if b"\0" in line:
                    raise ConfigError(f"{path}, line {i}, holds a NUL byte: it is no text")
                yield i, line.decode("utf-8-sig" if i == 1 else "utf-8")
    except UnicodeDecodeError as e:
        raise ConfigError(
            f"{path}, line {i}: byte {e.object[e.start]:#x} is not UTF-8 ({e.reason}); convert the "
            "file, for example with iconv"
        ) from None
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror}") from None


def record_of(
    line: str,
    place: str,
    fields: tuple[str, ...],
    optional: tuple[str, ...],
    lists: tuple[str, ...],
) -> dict[str, Any]:
    """One record of a .jsonl file, checked."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{place}, is not JSON: {e}") from None
    if not isinstance(record, dict):
        raise ConfigError(f"{place}: an object is expected, found {kind(record)}")
    for name in (*fields, *lists):
        if name not in record:
            raise ConfigError(
                f"{place}: the record has no field {name!r}; it has: {', '.join(record)}"
            )
    for name in (*fields, *optional):
        value = record.get(name)
        if not isinstance(value, str) and not (value is None and name in optional):
            raise ConfigError(f"{place}: field {name!r} must be text, found {kind(value)}")
        check_characters(value or "", place)
    for name in lists:
        value = record[name]
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise ConfigError(f"{place}: field {name!r} must be a list of texts")
        check_characters("".join(value), place)
    return record


def check_characters(text: str, place: str) -> None:
    """Raises ConfigError for half of a surrogate pair, which JSON can write and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ConfigError(f"{place}: {text[e.start]!r} is half a character") from None


def kind(value: Any) -> str:
    """What JSON calls a value."""
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value"}
    return "null" if value is None else names.get(type(value), "a number")


def data_folder(data_root: str | None) -> Path | None:
    """The folder of local data: the option, else `PRUNEKIT_DATA`, else none. Raises ConfigError if
    it is named and missing.
    """
    named = data_root or os.environ.get("PRUNEKIT_DATA")
    if not named:
        return None
    try:
        found = Path(named).expanduser().is_dir()
    except (ValueError, RuntimeError, OSError):
        found = False
    if not found:
        raise ConfigError(
            f"data_root={named!r} is not a folder (option data_root or environment variable "
            "PRUNEKIT_DATA)"
        )
    return Path(named).expanduser()


def _folder(data_root: str | None) -> str | None:
    data_folder(data_root)
    return data_root


TextFile = Annotated[str, AfterValidator(existing_file)]
"""Type of an option that names a text or jsonl file; a missing one is found before a weight is
read.
"""
DataRoot = Annotated[str | None, AfterValidator(_folder)]
"""Type of the option `data_root`."""
