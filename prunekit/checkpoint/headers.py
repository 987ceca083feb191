"""Headers of safetensors files: names, types and shapes, checked against the size of the file
before anything is allocated for them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from prunekit.checkpoint.integrity import CheckpointError, plain_json

LARGEST_HEADER = 16 * 2**20
"""Bytes: 100,000 tensors; the format itself allows six times as much."""
MOST_AXES = 16
BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "U16": 16, "I16": 16}
BITS |= {"F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64}
BITS |= {"C64": 64}
"""Types of the format, and the bits of an element."""


@dataclass(frozen=True)
class Header:
    """What a file says of its tensors: shape and type by name, and its own notes."""

    shapes: dict[str, tuple[int, ...]]
    types: dict[str, str]
    notes: dict[str, str]


def read_header(path: Path) -> Header:
    """Raises CheckpointError naming file and tensor where the header is damaged, or does not
    account for every byte of the file.
    """
    content, rest = header_bytes(path)
    header: Any = plain_json(content, f"{path}: its header")
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its header is not an object")
    notes = header.pop("__metadata__", None) or {}
    if not isinstance(notes, dict) or not all(isinstance(v, str) for v in notes.values()):
        raise CheckpointError(f"{path}: __metadata__ must hold strings")
    places = sorted((span(path, name, entry), name) for name, entry in header.items())
    end = 0
    for (start, stop), name in places:
        if start != end:
            raise CheckpointError(f"{path}: {name!r} begins at byte {start}, and not at {end}")
        end = stop
    if end != rest:
        raise CheckpointError(
            f"{path}: has {rest} bytes of tensors, its header asks for {end}; truncated?"
        )
    return Header(
        {name: tuple(entry["shape"]) for name, entry in header.items()},
        {name: entry["dtype"] for name, entry in header.items()},
        notes,
    )


def header_bytes(path: Path) -> tuple[bytes, int]:
    """The header as it is in the file, and how many bytes follow it."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(8)
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
            if not 2 <= length <= min(LARGEST_HEADER, size - 8):
                raise CheckpointError(
                    f"{path} is not a safetensors file: its header would have {length} bytes of "
                    f"{size}, and at most {LARGEST_HEADER} are read"
                )
            return file.read(length), size - 8 - length
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def span(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """First byte of a tensor and the one after its last. Raises CheckpointError where type, shape
    and bytes do not agree.
    """
    field = f"{path}: header of tensor {name!r}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CheckpointError(f"{field} is damaged: it must have dtype, shape and data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in BITS:
        raise CheckpointError(f"{field}: dtype {kind!r}; possible: {', '.join(BITS)}")
    if not naturals(shape) or len(shape) > MOST_AXES:
        raise CheckpointError(f"{field}: shape {str(shape)[:80]} is no list of sizes")
    if not naturals(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{field}: data_offsets {str(offsets)[:80]} is no pair of bytes")
    start, stop = offsets
    if stop - start != prod(shape) * BITS[kind] // 8:
        raise CheckpointError(
            f"{field}: shape {str(shape)[:80]} of {kind} does not take {stop - start} bytes"
        )
    return start, stop


def naturals(values: Any) -> bool:
    """Whether this is a list of whole numbers, none negative."""
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)
