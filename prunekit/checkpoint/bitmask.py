"""Tensors with many zeros in a safetensors file: one bit for each element that says whether it is
zero, and the others in a row. Lossless.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prunekit.checkpoint.integrity import CheckpointError

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
        bits = torch.from_numpy(np.packbits(held.numpy()))
        if (
            tensor.numel()
            and bits.numel() + int(held.sum()) * tensor.element_size()
            < tensor.numel() * tensor.element_size()
        ):
            out[name + BITS], out[name + VALUES], shapes[name] = (
                bits,
                tensor.flatten()[held].clone(),
                list(tensor.shape),
            )
        else:
            out[name] = tensor.clone()
    save_file(out, path, {SHAPES: json.dumps(shapes)})


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors as they were given to `write`. Raises CheckpointError naming the tensor whose
    mask and values do not fit.
    """
    from safetensors import safe_open

    with safe_open(path, "pt") as f:
        shapes: dict[str, list[int]] = json.loads((f.metadata() or {}).get(SHAPES, "{}"))
        packed = {name + end for name in shapes for end in (BITS, VALUES)}
        if not packed <= set(f.keys()):
            raise CheckpointError(f"{path}: {sorted(packed - set(f.keys()))[0]} is missing")
        out = {name: f.get_tensor(name) for name in f.keys() if name not in packed}  # noqa: SIM118 (not a dict)
        for name, shape in shapes.items():
            bits, values = f.get_tensor(name + BITS), f.get_tensor(name + VALUES)
            count = torch.Size(shape).numel()
            if bits.numel() != -(-count // 8):
                raise CheckpointError(
                    f"{path}: {name}{BITS} has {bits.numel()} bytes, and {count} elements need "
                    f"{-(-count // 8)}"
                )
            held = torch.from_numpy(np.unpackbits(bits.numpy(), count=count)).bool()
            if int(held.sum()) != values.numel():
                raise CheckpointError(
                    f"{path}: {name}{VALUES} has {values.numel()} elements, its mask says "
                    f"{int(held.sum())}"
                )
            out[name] = (
                torch.zeros(count, dtype=values.dtype).masked_scatter_(held, values).view(shape)
            )
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
            names.append(
                file.removesuffix(ENDING) + ".safetensors" if file.endswith(ENDING) else file
            )
            if file.endswith(ENDING):
                save_file(read(folder / file), plain / names[-1], {"format": "pt"})
            else:
                shutil.copyfile(folder / file, plain / file)
        yield plain, names


def raw(tensor: Tensor) -> Tensor:
    """(elements, bytes of an element) of a contiguous tensor."""
    return tensor.reshape(-1, 1).view(torch.uint8)
