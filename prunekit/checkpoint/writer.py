"""Write a pruned model as a folder that loads by itself: no pickles, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from prunekit.architecture.mapped import mapped
from prunekit.architecture.offload import lend_weights, offloaded, stored_value
from prunekit.checkpoint import bitmask
from prunekit.checkpoint.config_choice import describe
from prunekit.checkpoint.construction import stock_class
from prunekit.checkpoint.draft_layers import without_draft_layers
from prunekit.checkpoint.integrity import read_json
from prunekit.checkpoint.layout import describe_runtime_modules
from prunekit.checkpoint.manifest import MANIFEST, build_manifest, write_manifest
from prunekit.errors import ConfigError
from prunekit.graph.edit_record import edits
from prunekit.types import Group, Kept

HOW_READ = {"is_local", "local_files_only"}
"""What transformers writes down with a tokenizer that it read from a folder, though it says nothing
about the tokenizer, and would keep others from the hub.
"""


def save(
    model: nn.Module,
    tokenizer: Any,
    folder: str | Path,
    *,
    kept: Kept | None = None,
    groups: list[Group] | None = None,
    config: dict[str, Any] | None = None,
    counts: dict[str, Any] | None = None,
    merges: Sequence[Mapping[str, Any]] = (),
    max_shard_size: int | str | None = None,
    packed: bool = False,
    check: bool = True,
) -> Path:
    """Write model, tokenizer and `pruning.json` into `folder`, which appears only when it is
    complete.

    Args:
        kept: as a pruner returns it.
        groups: likewise.
        config: the run's configuration, only noted.
        counts: what was measured, likewise.
        merges: blocks that became part of others (`graph.merging.Merge`), for a replay.
        max_shard_size: bytes, or a text such as "5GB", which is the default; 1GB of a model whose
            weights lie in files.
        packed: zeros are stored as a bitmask: lossless, and only `prunekit.load` reads it.
        check: a few tokens go through the model as a loader would build it and through the model
            itself; the logits must be the same to the bit.

    A model that accelerate spread over devices, host memory or disk stays as it is; its weights are
    written one shard at a time. Raises ConfigError for a model that no config can describe, and for
    a folder that holds something else.
    """
    folder = Path(folder)
    _check_target(folder)
    _check_model(model)
    config_of_model, layout, copy = describe(model, check)
    with appears_when_complete(folder) as part:
        shard = max_shard_size or ("1GB" if mapped(model) else "5GB")
        lend_weights(model, copy)
        # Under the names of the modules that the layout names: engines know no others for a class
        # that is not theirs.
        copy.save_pretrained(part, max_shard_size=shard, save_original_format=not layout)
        if config_of_model._experts_implementation == "eager":
            _note(part / "config.json", experts_implementation="eager")
        if layout:
            _note_base_model(part / "config.json", copy)
        without_draft_layers(part / "config.json", copy)
        if packed:
            bitmask.pack(part)
        if tokenizer is not None:
            _save_tokenizer(tokenizer, part)
        gone = [m for m in describe_runtime_modules(model) if m["kind"] == "bypass"]
        manifest = build_manifest(
            part,
            kept or {},
            groups or [],
            config=config or {},
            counts=counts or {},
            layout=layout,
            merges=merges,
            bypassed={m["path"]: m["outputs"] for m in gone},
            blocks=edits(model)["blocks"],
        )
        write_manifest(part, manifest)
    return folder


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
    describe_runtime_modules(model)
    for name in offloaded(model)[:1]:
        stored_value(model, name)
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if len(dtypes) > 1:
        names = sorted(str(d).removeprefix("torch.") for d in dtypes)
        raise ConfigError(
            f"the model mixes {' and '.join(names)}, and transformers loads one type; cast it "
            "first: model.to(torch.float32)"
        )


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """The same files, wherever the tokenizer was read from."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    content = read_json(file) if file.is_file() else {}
    if content.keys() & HOW_READ:
        content = {k: v for k, v in content.items() if k not in HOW_READ}
        text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
        file.write_text(text + "\n", encoding="utf-8")


def _note(file: Path, **fields: Any) -> None:
    """Write fields that transformers reads from config.json but does not write there."""
    content = json.dumps({**read_json(file), **fields}, indent=2, sort_keys=True)
    file.write_text(content + "\n", encoding="utf-8")


def _note_base_model(file: Path, model: Any) -> None:
    """Name the class without a head as well: serving engines put their own on it."""
    from transformers import PreTrainedModel

    from prunekit.checkpoint.remote_code import modeling_pruned

    base = model.base_model
    if base is model and model.get_output_embeddings() is not None:
        # The prefix of Llama 4's class names no module.
        base = next((m for m in model.children() if isinstance(m, PreTrainedModel)), base)
    name = modeling_pruned.PREFIX + type(base).__name__
    auto_map = {**read_json(file)["auto_map"], "AutoModel": f"modeling_pruned.{name}"}
    _note(file, auto_map=auto_map)


@contextmanager
def appears_when_complete(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write into, which then takes its name; an earlier checkpoint of
    that name makes way. After an error all is as it was.
    """
    part = folder.parent / f".{folder.name}.part{os.getpid()}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        _let_read(part)
        _sync(part)
        old = folder.parent / f".{folder.name}.old{os.getpid()}"
        if folder.is_dir():
            os.replace(folder, old)
        os.replace(part, folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _let_read(folder: Path) -> None:
    """Give safetensors, which their library lets nobody but the writer read, the permissions of the
    folder, without those to enter one.
    """
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*.safetensors"):
        path.chmod(mode)


def _sync(folder: Path) -> None:
    """Bring everything to the disk."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
