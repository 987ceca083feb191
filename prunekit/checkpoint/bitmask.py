"""Tensors with many zeros in a safetensors file: one bit for each element that says whether it is
zero, and the others in a row. Lossless.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prunekit.checkpoint.headers import MOST_AXES, naturals, read_header
from prunekit.checkpoint.integrity import CheckpointError, plain_json

ENDING = ".bitmask.safetensors"
"""Packed files have a name of their own, so that a loader that does not know them finds no weights
rather than wrong ones.
"""
BITS, VALUES = ".bitmask", ".values"
SHAPES = "prunekit_bitmask"
"""Key of the metadata: tensor name -> shape, for those that are packed."""


def write(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Write `tensors`, each packed where that is smaller. Not zero is what has any bit set, so that
    -0.0 and NaNs come back as they were.
    """
    from safetensors.torch import save_file

    out: dict[str, Tensor] = {}
    shapes = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        held = raw(tensor).ne(0).any(1)
        bits = bits_of(held)
        zeros = tensor.numel() - int(held.sum())
        if zeros * tensor.element_size() > bits.numel():
            out[name + BITS], out[name + VALUES] = bits, tensor.flatten()[held].clone()
            shapes[name] = list(tensor.shape)
        else:
            out[name] = tensor.clone()
    save_file(out, path, {SHAPES: json.dumps(shapes)})


def logical_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a file holds, as they are once unpacked; from its header
    alone. Raises CheckpointError naming the tensor whose mask and values do not fit.
    """
    header = read_header(path)
    if SHAPES not in header.notes:
        return header.shapes
    packed = plain_json(header.notes[SHAPES].encode(), f"{path}: {SHAPES}")
    if not isinstance(packed, dict) or not path.name.endswith(ENDING):
        raise CheckpointError(f"{path}: {SHAPES} must be an object, in a file named *{ENDING}")
    shapes = dict(header.shapes)
    for name, shape in packed.items():
        if not naturals(shape) or len(shape) > MOST_AXES:
            raise CheckpointError(f"{path}: {SHAPES}: {name!r} has the shape {str(shape)[:80]}")
        bits, values = shapes.pop(name + BITS, None), shapes.pop(name + VALUES, None)
        if bits is None or values is None or name in header.shapes:
            raise CheckpointError(f"{path}: {name}{BITS} or {name}{VALUES} is missing, or {name}")
        count = prod(shape)
        if bits != (-(-count // 8),) or header.types[name + BITS] != "U8":
            raise CheckpointError(
                f"{path}: {name}{BITS} has {bits} bytes, and {count} elements need {-(-count // 8)}"
            )
        if len(values) != 1 or values[0] > count:
            raise CheckpointError(
                f"{path}: {name}{VALUES} has {values} elements, of {count} at most"
            )
        shapes[name] = tuple(shape)
    return shapes


def plain_name(file: str) -> str:
    """What a file is called once it is unpacked."""
    return file.removesuffix(ENDING) + ".safetensors" if file.endswith(ENDING) else file


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors as they were given to `write`. Raises CheckpointError naming the tensor whose
    mask and values do not fit.
    """
    from safetensors import safe_open

    shapes = logical_shapes(Path(path))
    out: dict[str, Tensor] = {}
    with safe_open(path, "pt") as f:
        held_names = set(f.keys())
        for name, shape in shapes.items():
            if name in held_names:
                out[name] = f.get_tensor(name)
                continue
            bits, values = f.get_tensor(name + BITS), f.get_tensor(name + VALUES)
            count = prod(shape)
            held = mask_of(bits, count)
            if int(held.sum()) != values.numel():
                raise CheckpointError(
                    f"{path}: {name}{VALUES} has {values.numel()} elements, its mask says "
                    f"{int(held.sum())}"
                )
            out[name] = filled(held, values).view(shape)
    return out


def pack(folder: Path) -> None:
    """Replace every safetensors file of a checkpoint folder by its packed form, file by file."""
    from safetensors.torch import load_file

    for file in sorted(folder.glob("*.safetensors")):
        write(load_file(file), file.with_name(file.name.removesuffix(".safetensors") + ENDING))
        file.unlink()


@contextmanager
def unpacked(folder: Path, files: Sequence[str]) -> Iterator[tuple[Path, list[str]]]:
    """The folder and its `files` as transformers reads them: themselves where nothing is packed,
    else copies that live inside the `with`.
    """
    from safetensors.torch import save_file

    if not any(f.endswith(ENDING) for f in files):
        yield folder, list(files)
        return
    with tempfile.TemporaryDirectory(prefix="prunekit-") as name:
        plain, names = Path(name), []
        for file in files:
            names.append(plain_name(file))
            if file.endswith(ENDING):
                save_file(read(folder / file), plain / names[-1], {"format": "pt"})
            else:
                shutil.copyfile(folder / file, plain / file)
        yield plain, names


def raw(tensor: Tensor) -> Tensor:
    """(elements, bytes of an element) of a contiguous tensor."""
    return tensor.reshape(-1, 1).view(torch.uint8)


def bits_of(mask: Tensor) -> Tensor:
    """A bool mask in host memory, one bit an element, the first one highest."""
    return torch.from_numpy(np.packbits(mask.numpy()))


def mask_of(bits: Tensor, count: int) -> Tensor:
    """The flat mask of `count` elements that `bits_of` was given."""
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=count)).bool()


def filled(mask: Tensor, values: Tensor) -> Tensor:
    """`values` in a row where the mask is True, zeros elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype).masked_scatter_(mask, values)
