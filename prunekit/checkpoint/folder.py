"""What may lie in a checkpoint folder: plain files. Nothing here opens one."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from prunekit.checkpoint.integrity import CheckpointError

PICKLES = (
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
OWN_CODE = (
    "modeling_pruned.py",
    "runtime_modules.py",
    "runtime_base.py",
    "stream_modules.py",
    "early_exit.py",
)
"""The code that prunekit writes beside the weights; it is never run from the folder."""
ADAPTERS = "adapter_"
"""What peft's files begin with: transformers loads them unasked, on top of the weights."""
READ_UNASKED = re.compile(
    r".*\.(json|jinja|model|tiktoken|py|safetensors.*)|(vocab|merges)\.txt", re.DOTALL
)
"""Files that a loader reads when they are there, whether or not the manifest lists them."""
LARGEST_FILE = 256 * 2**20
"""Bytes of a file that holds no weights; the largest tokenizers have 40 MB."""


def check_files(folder: Path) -> None:
    """Raises CheckpointError naming the first thing in the folder, at any depth, that is not a
    plain file of a fitting size, lies elsewhere, or holds weights that are not safetensors.
    """
    check_plain(folder)
    for path in walk(folder):
        if path.is_symlink():
            inward = path.resolve().is_relative_to(folder.resolve())
            if not inward and not hub_cache(path):
                raise CheckpointError(f"{path} is a link that leads out of {folder}")
        if path.name.lower().endswith(PICKLES):
            raise CheckpointError(f"{path}: only safetensors are loaded; a pickle can run any code")
        size = path.stat().st_size
        if size > LARGEST_FILE and not path.name.endswith(".safetensors"):
            raise CheckpointError(f"{path} has {size} bytes; at most {LARGEST_FILE} are read")


def check_plain(folder: Path) -> None:
    """Raises CheckpointError naming the first device, FIFO, socket, or link that leads nowhere:
    whoever opens one may wait forever.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    for path in walk(folder):
        try:
            status = path.stat()
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{path} is a link that leads nowhere: {error}") from None
        if not stat.S_ISREG(status.st_mode) and not (path.is_symlink() and path.is_dir()):
            raise CheckpointError(f"{path} is not a plain file")


def check_own(folder: Path, listed: Iterable[str]) -> None:
    """Raises CheckpointError for adapters, for code of others, and for files that a loader would
    read though the manifest does not list them.
    """
    listed = set(listed)
    names = {path.name for path in folder.iterdir()} | listed
    for name in sorted(names):
        if name.startswith(ADAPTERS):
            raise CheckpointError(
                f"{folder / name}: adapters are not loaded; merge them before saving"
            )
        if name.endswith(".py") and name not in OWN_CODE:
            raise CheckpointError(
                f"{folder / name}: code of others is not loaded; possible: {', '.join(OWN_CODE)}"
            )
        if name not in listed and name != "pruning.json" and READ_UNASKED.fullmatch(name):
            raise CheckpointError(f"{folder / name}: not among the files of pruning.json")


def walk(folder: Path) -> Iterator[Path]:
    """Everything below the folder but folders; links to folders are not followed."""

    def failed(error: OSError) -> None:
        raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}")

    for root, folders, names in os.walk(folder, onerror=failed):
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        for name in sorted([*names, *links]):
            yield Path(root) / name


def hub_cache(path: Path) -> bool:
    """The hub's cache keeps `snapshots/<commit>/file -> ../../blobs/<hash>`: a link out of the
    folder, but into the same cache.
    """
    target, snapshot = path.resolve(), path.absolute().parent
    return (
        snapshot.parent.name == "snapshots"
        and target.parent == (snapshot.parent.parent / "blobs").resolve()
    )


def inside(folder: Path, name: Any, field: str) -> Path:
    """The file `name` of the folder. Raises CheckpointError if the name is a path."""
    if (
        not isinstance(name, str)
        or not name
        or Path(name).name != name
        or name in (".", "..")
        or "\\" in name
        or "\0" in name
    ):
        raise CheckpointError(f"{field}: {name!r} is not the name of a file in {folder}")
    return folder / name
