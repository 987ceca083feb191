"""Load a folder that `save` wrote: everything is checked before a weight is read, and no code of
the folder runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunekit.checkpoint import bitmask
from prunekit.checkpoint.class_sizes import REFUSALS
from prunekit.checkpoint.construction import build_on_meta
from prunekit.checkpoint.integrity import CheckpointError, check_index, read_header, read_json
from prunekit.checkpoint.manifest import check_manifest
from prunekit.checkpoint.state import tensors


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
    with bitmask.unpacked(folder, list(manifest["files"])) as (plain, files):
        config, kind = _config_and_class(plain)
        _check_headers(plain, files, config, kind)
        return _read(plain, config, kind, dtype, device), _read_tokenizer(plain, files)


def outline(path: str | Path) -> nn.Module:
    """The model of a folder that `save` wrote, on the meta device: shapes only, the files of
    weights are not opened. Raises CheckpointError as `load` does.
    """
    folder = Path(path)
    check_manifest(folder, weights=False)
    config, kind = _config_and_class(folder)
    return build_on_meta(kind, config).eval()


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
    except (*REFUSALS, SafetensorError) as error:
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


def _read_tokenizer(folder: Path, files: list[str]) -> Any:
    from transformers import AutoTokenizer

    if not {"tokenizer.json", "tokenizer_config.json"} & set(files):
        return None
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _config_and_class(folder: Path) -> tuple[Any, Any]:
    """The config and the model class, from names that transformers itself registers; no remote code
    is looked at.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, PreTrainedModel

    from prunekit.checkpoint.remote_code import modeling_pruned
    from prunekit.checkpoint.remote_code.modeling_pruned import PREFIX

    name, raw = folder / "config.json", read_json(folder / "config.json")
    if not isinstance(raw.get("model_type"), str) or raw["model_type"] not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{name}: model_type {raw.get('model_type')!r} is not one of transformers'"
        )
    if raw.get("quantization_config") is not None:
        raise CheckpointError(f"{name}: quantization_config is not something that prunekit writes")
    names = raw.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise CheckpointError(f"{name}: architectures must name one class, found {names!r}")
    base = getattr(transformers, names[0].removeprefix(PREFIX), None)
    if not (isinstance(base, type) and issubclass(base, PreTrainedModel)):
        raise CheckpointError(
            f"{name}: architectures names {names[0]!r}, which is not a model class of transformers"
        )
    try:
        config = CONFIG_MAPPING[raw["model_type"]].from_pretrained(folder, local_files_only=True)
    except (*REFUSALS, StrictDataclassError, OSError) as error:
        raise CheckpointError(f"{name}: {error}") from None
    if base.__name__ not in _classes_of(config) and not isinstance(config, base.config_class or ()):
        raise CheckpointError(
            f"{name}: architectures names {names[0]!r}, whose model_type is not "
            f"{raw['model_type']!r}"
        )
    return config, getattr(modeling_pruned, names[0]) if names[0].startswith(PREFIX) else base


def _classes_of(config: Any) -> tuple[str, ...]:
    """Names of the causal language models that transformers registers for the config."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, ())
    return (found,) if isinstance(found, str) else tuple(found)


def _check_headers(folder: Path, held_files: list[str], config: Any, kind: type) -> None:
    """Compare names, shapes and places in the safetensors headers with the model that config.json
    asks for, and with the index.
    """
    from huggingface_hub.errors import StrictDataclassError

    name = folder / "config.json"
    layers = config.get_text_config().num_hidden_layers
    files = [f for f in held_files if f.endswith(".safetensors")]
    if not isinstance(layers, int) or layers > sum(len(read_header(folder / f)) for f in files):
        raise CheckpointError(
            f"{name}: num_hidden_layers is {layers!r}, more than there are tensors"
        )
    try:
        expected = tensors(build_on_meta(kind, config))
    except (*REFUSALS, StrictDataclassError) as error:
        raise CheckpointError(f"{name}: no model can be built from it: {error}") from None
    held: dict[str, str] = {}
    for file in files:
        for tensor, shape in read_header(folder / file).items():
            held[tensor] = file
            if tensor in expected and tuple(expected[tensor].shape) != shape:
                want = tuple(expected[tensor].shape)
                raise CheckpointError(
                    f"{folder / file}: {tensor} has shape {shape}, {name} asks for {want}"
                )
    check_index(folder, held)
