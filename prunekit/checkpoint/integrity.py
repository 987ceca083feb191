"""What makes a checkpoint folder trustworthy: hashes of its files, and JSON read with care."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from prunekit.errors import ConfigError

LARGEST_JSON = 64 * 2**20
"""Bytes: the kept units of a model of 400 billion parameters take 40 MB."""


class CheckpointError(ConfigError):
    """A folder that is not a checkpoint as prunekit writes it; the message names the file and the
    field.
    """


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal. Raises CheckpointError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def seal(manifest: dict[str, Any]) -> str:
    """SHA-256 of the manifest itself without its own `seal`."""
    rest = {k: v for k, v in manifest.items() if k != "seal"}
    return hashlib.sha256(
        json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def plain_json(content: bytes, what: str) -> Any:
    """What JSON says. Raises CheckpointError that begins with `what` for everything else."""
    try:
        return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # numbers of over 4,300 digits are a ValueError
        raise CheckpointError(f"{what} cannot be read as JSON: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError naming the file where it is missing, too large, not
    JSON, or not an object.
    """
    try:
        if not path.is_file():
            raise CheckpointError(
                f"{path.name} is missing in {path.parent}: no checkpoint of prunekit, or "
                "half-written"
            )
        size = path.stat().st_size
        if size > LARGEST_JSON:
            raise CheckpointError(f"{path} has {size} bytes; at most {LARGEST_JSON} are read")
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    found = plain_json(content, str(path))
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} must hold an object, found {type(found).__name__}")
    return found


def check_index(folder: Path, held: dict[str, str]) -> None:
    """Raises CheckpointError where the index of a sharded checkpoint is missing, or does not say
    where the tensors are (`held`: tensor -> file).
    """
    files = sorted(set(held.values()))
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        if files != ["model.safetensors"]:
            raise CheckpointError(
                f"{index.name} is missing in {folder}, which holds {', '.join(files)}"
            )
        return
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict):
        raise CheckpointError(f"{index}: weight_map must be an object")
    for tensor in sorted(places.keys() | held.keys()):
        if places.get(tensor) != held.get(tensor):
            raise CheckpointError(
                f"{index}: weight_map[{tensor!r}] is {places.get(tensor)!r}, the tensor is in "
                f"{held.get(tensor)}"
            )
