"""What makes a checkpoint folder trustworthy: hashes of its files, no weight file but safetensors,
headers that agree with the model.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

from prunekit.errors import ConfigError

REFUSED = (
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".pkl",
    ".pickle",
    ".h5",
    ".msgpack",
    ".npy",
    ".npz",
    ".joblib",
    ".dill",
    ".onnx",
    ".gguf",
)
"""Endings of weight files that are not safetensors; most of them are pickles, and loading a pickle
runs code.
"""
LARGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors format."""


class CheckpointError(ConfigError):
    """A folder that is not a checkpoint as prunekit writes it; the message names the file and the
    field.
    """


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(manifest: dict[str, Any]) -> str:
    """SHA-256 of the manifest itself without its own `seal`."""
    rest = {k: v for k, v in manifest.items() if k != "seal"}
    return hashlib.sha256(
        json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError naming the file where it is missing, not JSON, or not
    an object.
    """
    try:
        found = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.name} is missing in {path.parent}: no checkpoint of prunekit, or half-written"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} must hold an object, found {type(found).__name__}")
    return found


def inside(folder: Path, name: Any, field: str) -> Path:
    """The file `name` of the folder. Raises CheckpointError if the name is a path, or a link that
    leads out of the folder.
    """
    if (
        not isinstance(name, str)
        or not name
        or Path(name).name != name
        or name in (".", "..")
        or "\\" in name
        or "\0" in name
    ):
        raise CheckpointError(f"{field}: {name!r} is not the name of a file in {folder}")
    path = folder / name
    if path.is_symlink() and path.resolve().parent != folder.resolve() and not _hub_cache(path):
        raise CheckpointError(f"{field}: {name!r} is a link that leads out of {folder}")
    return path


def _hub_cache(path: Path) -> bool:
    """The hub's cache keeps `snapshots/<commit>/file -> ../../blobs/<hash>`: a link out of the
    folder, but into the same cache.
    """
    target, snapshot = path.resolve(), path.absolute().parent
    return (
        snapshot.parent.name == "snapshots"
        and target.parent == (snapshot.parent.parent / "blobs").resolve()
    )


def refuse_pickles(folder: Path) -> None:
    """Raises CheckpointError naming the first weight file that is not safetensors."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    for root, _, names in os.walk(folder):
        for name in sorted(names):
            if name.lower().endswith(REFUSED):
                raise CheckpointError(
                    f"{Path(root) / name}: only safetensors are loaded; a pickle can run any code"
                )


def check_index(folder: Path, held: dict[str, str]) -> None:
    """Compare the index of a sharded checkpoint with where the tensors are (`held`: tensor ->
    file).
    """
    files = sorted(set(held.values()))
    index = folder / "model.safetensors.index.json"
    if not index.exists():
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


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a safetensors file, from its header alone. Raises CheckpointError naming
    file and tensor.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        if not 2 <= length <= min(LARGEST_HEADER, size - 8):
            raise CheckpointError(
                f"{path} is not a safetensors file: its header would have {length} bytes of {size}"
            )
        try:
            header = json.loads(file.read(length).decode("utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise CheckpointError(f"{path} is not a safetensors file: {error}") from None
    shapes, end = {}, 0
    for name, entry in header.items():
        if name != "__metadata__":
            try:
                shapes[name] = tuple(int(n) for n in entry["shape"])
                end = max(end, int(entry["data_offsets"][1]))
            except (KeyError, TypeError, ValueError, IndexError):
                raise CheckpointError(f"{path}: header of tensor {name!r} is damaged") from None
    if end != size - 8 - length:
        raise CheckpointError(
            f"{path}: has {size - 8 - length} bytes of tensors, its header asks for {end}; "
            "truncated?"
        )
    return shapes
