"""Load a folder that `save` wrote: everything is checked before a weight is read, and no code of
the folder runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunekit.checkpoint import bitmask
from prunekit.checkpoint.class_sizes import REFUSALS
from prunekit.checkpoint.config_reader import (
    Bounds,
    build_checked,
    check_buffers,
    config_and_class,
)
from prunekit.checkpoint.integrity import CheckpointError, check_index
from prunekit.checkpoint.manifest import MANIFEST, check_manifest, check_weights
from prunekit.checkpoint.state import tensors
from prunekit.graph.edit_record import record_blocks


def load(
    path: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> tuple[nn.Module, Any]:
    """Model in eval mode and tokenizer (None where none was saved) from a folder that `save` wrote,
    without remote code.

    `dtype` default: as saved. Raises CheckpointError naming file and field for anything that does
    not fit, before a weight is read.
    """
    folder = Path(path)
    manifest = check_manifest(folder)
    config, kind = _check_headers(folder, manifest)
    check_weights(folder, manifest)
    with bitmask.unpacked(folder, list(manifest["files"])) as (plain, files):
        model = _read(plain, config, kind, dtype, device)
        _note_blocks(model, manifest.get("blocks", {}), f"{folder / MANIFEST}: blocks")
        return model, read_tokenizer(plain, files)


def outline(path: str | Path) -> nn.Module:
    """The model of a folder that `save` wrote, on the meta device: shapes only, the files of
    weights are not opened. Raises CheckpointError as `load` does.
    """
    folder = Path(path)
    check_manifest(folder)
    config, kind = config_and_class(folder, Bounds())
    return build_checked(folder, config, kind).eval()


def _check_headers(folder: Path, manifest: dict[str, Any]) -> tuple[Any, Any]:
    """Config and class, once names, shapes and places in the headers are those that config.json
    asks for.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    places: dict[str, str] = {}
    for file in manifest["files"]:
        if file.endswith(".safetensors"):
            found = bitmask.logical_shapes(folder / file)
            twice = sorted(found.keys() & shapes.keys())
            if twice:
                raise CheckpointError(
                    f"{folder / file}: {twice[0]} is in {places[twice[0]]} as well"
                )
            shapes |= found
            places |= dict.fromkeys(found, file)
    config, kind = config_and_class(folder, Bounds.of(shapes))
    model = build_checked(folder, config, kind)
    check_buffers(folder, model, shapes)
    for name, tensor in tensors(model).items():
        if name in shapes and tuple(tensor.shape) != shapes[name]:
            raise CheckpointError(
                f"{folder / places[name]}: {name} has shape {shapes[name]}, "
                f"{folder / 'config.json'} asks for {tuple(tensor.shape)}"
            )
    check_index(folder, {name: bitmask.plain_name(file) for name, file in places.items()})
    return config, kind


def _read(
    folder: Path,
    config: Any,
    kind: Any,
    dtype: torch.dtype | str | None,
    device: torch.device | str | None,
) -> nn.Module:
    """The model; a tensor too many, too few or of another shape is an error."""
    from safetensors import SafetensorError

    placed = {} if device is None else {"device_map": {"": torch.device(device)}}
    try:
        model, info = kind.from_pretrained(
            folder,
            config=config,
            dtype=dtype or "auto",
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **placed,
        )
    except (*REFUSALS, SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{folder}: the safetensors do not fit config.json: {error}"
        ) from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(what):
            raise CheckpointError(
                f"{folder}: {what.replace('_', ' ')} in the safetensors: "
                f"{sorted(map(str, info[what]))[:5]}"
            )
    ready: nn.Module = model.eval()
    return ready


def _note_blocks(model: nn.Module, value: Any, field: str) -> None:
    """Which blocks of the unpruned model are left. Raises CheckpointError naming the field for what
    cannot be.
    """
    if not isinstance(value, dict):
        raise CheckpointError(f"{field} must be a mapping")
    modules = dict(model.named_modules())
    for path, left in value.items():
        there = modules.get(path)
        fields: dict[str, Any] = left if isinstance(left, dict) else {}
        of, keep = fields.get("of"), fields.get("keep")
        if not isinstance(there, nn.ModuleList) or type(of) is not int:
            raise CheckpointError(f"{field}[{path!r}] is {left!r}, of no list of modules")
        if not isinstance(keep, list) or any(type(k) is not int or not 0 <= k < of for k in keep):
            raise CheckpointError(f"{field}[{path!r}].keep must be integers below {of}")
        if len(keep) != len(there) or keep != sorted(set(keep)):
            raise CheckpointError(
                f"{field}[{path!r}].keep must ascend, one for each of {len(there)} blocks"
            )
        record_blocks(model, path, {"of": of, "keep": keep})


def read_tokenizer(folder: Path, files: Iterable[str]) -> Any:
    """The tokenizer that is among the `files` of a checkpoint, else None. Raises CheckpointError
    for one that cannot be read.
    """
    from transformers import AutoTokenizer

    if {"tokenizer.json", "tokenizer_config.json"}.isdisjoint(files):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(
            f"{folder}: tokenizer.json or tokenizer_config.json cannot be read: "
            f"{type(error).__name__}: {error}"
        ) from error
