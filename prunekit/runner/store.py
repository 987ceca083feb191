"""Entries on disk: each file says whose it is and what its bytes hash to. What does not match is
thrown away, and a store that cannot be used costs time, never a run.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from prunekit.data.files import cache_folder, cache_limit
from prunekit.types import Scores

log = logging.getLogger("prunekit")
ENDING = ".entry"
MARK = "prunekit-entry-1"
LONGEST_HEADER = 200


def folder() -> Path:
    """In the cache. Raises ConfigError where there is no home."""
    return cache_folder() / "results"


@dataclass(frozen=True)
class Entry:
    """What something is stored under, what it is called in a result, what its bytes are, where they
    lie, and how many there may be.
    """

    key: str
    name: str
    decode: Callable[[bytes], Any]
    encode: Callable[[Any], bytes]
    path: Path
    most: int = field(default_factory=cache_limit)

    @classmethod
    def of_scores(cls, key: str) -> Entry:
        """Scores of the cache."""
        path = folder() / "scores" / f"{key}{ENDING}"
        return cls(key, "score", decode_scores, encode_scores, path)

    @classmethod
    def of_numbers(cls, key: str, name: str) -> Entry:
        """What an eval called `name` measured on the dense model."""
        path = folder() / "dense" / f"{key}{ENDING}"
        return cls(key, f"dense/{name}", decode_numbers, encode_numbers, path)

    @classmethod
    def of_reference(cls, key: str, name: str) -> Entry:
        """What an eval keeps of the dense model to compare others with."""
        path = folder() / "reference" / f"{key}{ENDING}"
        return cls(key, f"reference/{name}", decode_scores, encode_scores, path)

    @classmethod
    def of_kept(cls, key: str, name: str) -> Entry:
        """What a pruner or a ratio keeps of the dense model: see `types.Remember`."""
        path = folder() / "kept" / f"{key}{ENDING}"
        return cls(key, name, decode_scores, encode_scores, path)


class Damaged(ValueError):
    """A file that does not hold the entry that its name promises."""


def remember(entry: Entry, compute: Callable[[], Any]) -> tuple[Any, bool]:
    """What is stored, or what `compute` gives, stored then; and whether it was stored. One process
    computes, the others wait for it.
    """
    with lock(entry.path.with_suffix(".lock")):
        try:
            return read(entry), True
        except FileNotFoundError:
            pass
        except (Damaged, OSError) as error:
            log.warning("cache: %s is thrown away and computed anew: %s", entry.path, error)
        value = compute()
        write(entry, value)
    keep_within(folder(), cache_limit())
    return value, False


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Held by one process at a time; by nobody where the store cannot be written."""
    from filelock import FileLock

    held = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() and os.path.lexists(path):
            discard(path)
        held.acquire()
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
        log.warning("cache: %s cannot be locked: %s", path, error)
    try:
        yield
    finally:
        held.release()


def read(entry: Entry) -> Any:
    """The stored value. Raises FileNotFoundError where there is none, Damaged where it is not the
    one that was written.
    """
    path = entry.path
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise Damaged("it is not a file")
    if status.st_size > entry.most:
        raise Damaged(f"it has {status.st_size} bytes")
    with path.open("rb") as file:
        header, content = file.readline(LONGEST_HEADER).split(), file.read()
    if header[:1] != [MARK.encode()] or len(header) != 3:
        raise Damaged("its first line is not that of an entry")
    if header[1] != entry.key.encode():
        raise Damaged("it holds another entry")
    if header[2] != checksum(content):
        raise Damaged("its bytes do not match their checksum")
    os.utime(path)
    try:
        return entry.decode(content)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise Damaged(f"it cannot be read: {error}") from None


def write(entry: Entry, value: Any) -> None:
    """Whole or not at all; a store that cannot be written is said, and no error."""
    path, content = entry.path, entry.encode(value)
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(f"{MARK} {entry.key} ".encode() + checksum(content) + b"\n" + content)
        if path.is_dir():
            discard(path)
        aside.replace(path)
    except OSError as error:
        log.warning("cache: %s is not stored: %s", entry.name, error)
        try:
            aside.unlink(missing_ok=True)
        except OSError:
            log.debug("%s stays", aside)


def checksum(content: bytes) -> bytes:
    """128 bits in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(content).encode()


def discard(path: Path) -> None:
    """Removes what lies there, whatever it is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def keep_within(top: Path, limit: int) -> None:
    """Deletes the entries that were not used for longest until the rest fits into `limit` bytes.
    Others may do so at the same time.
    """
    entries = []
    for path in top.rglob(f"*{ENDING}*"):
        try:
            status = path.lstat()
        except OSError:
            continue
        if stat.S_ISREG(status.st_mode):
            entries.append((status.st_mtime_ns, status.st_size, path))
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total <= limit:
            break
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("cache: %s cannot be deleted: %s", path, error)
            break
        total -= size


def encode_scores(scores: Scores) -> bytes:
    """safetensors keep no order and no devices: the metadata does."""
    from safetensors.torch import save

    return save(
        {n: s.detach().cpu().clone().contiguous() for n, s in scores.items()},
        {"places": json.dumps({n: str(s.device) for n, s in scores.items()})},
    )


def decode_scores(content: bytes) -> Scores:
    """Each tensor on the device that it was on, in the order that it was in."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(content)
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    places = json.loads(header["__metadata__"]["places"])
    return {name: tensors[name].to(place) for name, place in places.items()}


def encode_numbers(numbers: dict[str, float]) -> bytes:
    return json.dumps(numbers).encode()


def decode_numbers(content: bytes) -> dict[str, float]:
    numbers: dict[str, float] = json.loads(content)
    return numbers
