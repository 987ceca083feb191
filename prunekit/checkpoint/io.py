"""Write a pruned model as a folder that loads by itself, and load such a folder; no pickles,
nothing half-written, nothing half-read.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunekit.checkpoint import bitmask
from prunekit.checkpoint.config_choice import describe
from prunekit.checkpoint.config_fit import REFUSALS
from prunekit.checkpoint.integrity import (
    MANIFEST,
    VERSION,
    CheckpointError,
    check_index,
    check_manifest,
    digest,
    read_header,
    read_json,
    seal,
)
from prunekit.checkpoint.layout import fresh, run_time_modules, stock_class, tensors
from prunekit.errors import ConfigError
from prunekit.types import Group, Kept

STRUCTURAL = ("neurons", "heads", "hidden", "experts", "blocks", "inner")


def save(
    model: nn.Module,
    tokenizer: Any,
    folder: str | Path,
    *,
    kept: Kept | None = None,
    groups: list[Group] | None = None,
    config: dict[str, Any] | None = None,
    counts: dict[str, Any] | None = None,
    max_shard_size: int | str = "5GB",
    packed: bool = False,
    check: bool = True,
) -> Path:
    """Write model, tokenizer and `pruning.json` into `folder`, which appears only when it is
    complete.

    `kept` and `groups` as a pruner returns them, `config` the run's configuration, `counts` what
    was measured. `packed` stores zeros as a bitmask: lossless, and only `prunekit.load` reads it.
    `check` runs a few tokens through the model as a loader would build it and through the model
    itself: the logits must be the same to the bit. Raises ConfigError for a model that no config
    can tell, and for a folder that holds something else.
    """
    folder = Path(folder)
    _check_target(folder)
    _check_model(model)
    told = describe(model, check)
    part = folder.parent / f".{folder.name}.part{os.getpid()}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        told.copy.save_pretrained(part, max_shard_size=max_shard_size)
        if told.config._experts_implementation == "eager":
            _tell_experts(part / "config.json")
        if packed:
            bitmask.pack(part)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        _write_manifest(
            part, _manifest(part, kept or {}, groups or [], config or {}, counts or {}, told.layout)
        )
        _publish(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


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
    """The model of a folder that `save` wrote, on the meta device: shapes only, no weight is read.
    Raises CheckpointError as `load` does.
    """
    folder = Path(path)
    check_manifest(folder)
    config, kind = _config_and_class(folder)
    return fresh(kind, config).eval()


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
    return model.eval()


def _read_tokenizer(folder: Path, files: list[str]) -> Any:
    from transformers import AutoTokenizer

    if not {"tokenizer.json", "tokenizer_config.json"} & set(files):
        return None
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _check_target(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; a checkpoint is a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise ConfigError(
            f"{folder} holds something that is not a checkpoint; it is not overwritten"
        )


def _check_model(model: nn.Module) -> None:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ConfigError(
            f"{type(model).__name__} cannot be saved; possible: a model of transformers, with "
            "adapters merged"
        )
    stock_class(model)
    run_time_modules(model)
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if len(dtypes) > 1:
        names = sorted(str(d).removeprefix("torch.") for d in dtypes)
        raise ConfigError(
            f"the model mixes {' and '.join(names)}, and transformers loads one type; cast it "
            "first: model.to(torch.float32)"
        )


def _tell_experts(file: Path) -> None:
    """Write how experts are run, which transformers reads from config.json but does not write
    there.
    """
    file.write_text(
        json.dumps({**read_json(file), "experts_implementation": "eager"}, indent=2, sort_keys=True)
        + "\n",
        encoding="utf-8",
    )


def _manifest(
    part: Path, kept: Kept, groups: list[Group], config: dict, counts: dict, layout: dict
) -> dict[str, Any]:
    entries = {}
    for group in groups:
        mask = kept.get(group.name)
        entry: dict[str, Any] = {"kind": group.kind, "layer": group.layer, "units": group.units}
        entry["members"] = [[m.param, m.axis] for m in group.members] or list(group.modules)
        entry["kept"] = _indices(mask, group)
        entries[group.name] = entry
    for name, mask in kept.items():
        if name not in entries and mask.dim() == 1:
            entries[name] = {
                "kind": name.split(".")[0],
                "layer": None,
                "units": mask.numel(),
                "kept": mask.nonzero()[:, 0].tolist(),
            }
    how = (
        "prunekit.load, or from_pretrained(path, trust_remote_code=True)"
        if layout
        else "from_pretrained(path)"
    )
    return {
        "version": VERSION,
        "loads_with": "prunekit.load" if any(part.glob("*" + bitmask.ENDING)) else how,
        "config": config,
        "counts": counts,
        "groups": entries,
        "files": {file.name: digest(file) for file in sorted(part.iterdir()) if file.is_file()},
    }


def _indices(mask: torch.Tensor | None, group: Group) -> list[int] | int:
    """Kept units in ascending order; for a matrix of weights only how many, since the zeros are in
    the tensor itself.
    """
    if group.kind == "weights":
        return int(mask.sum()) if mask is not None else group.units
    return mask.flatten().nonzero()[:, 0].tolist() if mask is not None else list(range(group.units))


def _write_manifest(part: Path, manifest: dict[str, Any]) -> None:
    plain = json.loads(json.dumps(manifest, default=str))
    plain["seal"] = seal(plain)
    (part / MANIFEST).write_text(json.dumps(plain, separators=(",", ":")), encoding="utf-8")


def _publish(part: Path, folder: Path) -> None:
    """Bring everything to the disk, then give the folder its name; an earlier checkpoint of that
    name makes way.
    """
    for path in [*part.rglob("*"), part]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    old = folder.parent / f".{folder.name}.old{os.getpid()}"
    if folder.is_dir():
        os.replace(folder, old)
    os.replace(part, folder)
    shutil.rmtree(old, ignore_errors=True)


def _config_and_class(folder: Path) -> tuple[Any, Any]:
    """The config and the model class, from names that transformers itself registers; no remote code
    is looked at.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, PreTrainedModel

    from prunekit.checkpoint.remote_code import modeling_pruned as carry

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
    base = getattr(transformers, names[0].removeprefix(carry.PREFIX), None)
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
    return config, getattr(carry, names[0]) if names[0].startswith(carry.PREFIX) else base


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
    layers, files = (
        config.get_text_config().num_hidden_layers,
        [f for f in held_files if f.endswith(".safetensors")],
    )
    if not isinstance(layers, int) or layers > sum(len(read_header(folder / f)) for f in files):
        raise CheckpointError(
            f"{name}: num_hidden_layers is {layers!r}, more than there are tensors"
        )
    try:
        expected = tensors(fresh(kind, config))
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
