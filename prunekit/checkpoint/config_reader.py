"""`config.json` of a folder: which class of transformers it asks for, checked as plain JSON first,
so that no number in it makes a constructor hang or fill the memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from torch import nn

from prunekit.checkpoint.class_sizes import REFUSALS
from prunekit.checkpoint.construction import build_on_meta
from prunekit.checkpoint.integrity import CheckpointError, read_json
from prunekit.checkpoint.state import non_persistent_buffers

LARGEST_NUMBER = 2**31 - 1
LARGEST_BUFFERS = 64 * 2**20
"""Bytes that buffers outside the weights may take where the weights are smaller than that."""
COUNTS = re.compile(r"(^|_)(layers?|blocks?)$")
SIZES = re.compile(r"(_size|_dim|_rank|_heads?|_layers?|_experts?|_groups?)$|^(num|n|d)_")
DROPOUT = re.compile(r"(dropout|pdrop)(_p|_prob|_rate)?$")
FOREIGN_CODE = re.compile(r"(attn|experts)_implementation$")
OWN_CODE = "modeling_pruned."
REFUSED = ("quantization_config", "compression_config")
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Bounds:
    """What a config may ask for: as many layers and experts as a class builds on the meta device in
    seconds, or more where there are tensors for them.
    """

    layers: int = 1024
    experts: int = 1024
    heads: int = 1 << 16

    @classmethod
    def of(cls, held: Shapes) -> Bounds:
        """For a checkpoint with tensors of these shapes."""
        largest = max((n for shape in held.values() for n in shape), default=0)
        return cls(max(len(held), 128), max(len(held), 1024), max(len(held), largest))


def config_and_class(folder: Path, bounds: Bounds) -> tuple[Any, Any]:
    """The config and the model class, from names that transformers itself registers; no remote code
    is looked at. Raises CheckpointError naming the field.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, PreTrainedModel

    from prunekit.checkpoint.remote_code import modeling_pruned
    from prunekit.checkpoint.remote_code.modeling_pruned import PREFIX

    name, raw = folder / "config.json", read_json(folder / "config.json")
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise CheckpointError(f"{name}: model_type {kind!r} is not one of transformers'")
    check_fields(name, raw, bounds)
    names = raw.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise CheckpointError(f"{name}: architectures must name one class, found {names!r}")
    base = getattr(transformers, names[0].removeprefix(PREFIX), None)
    if not (isinstance(base, type) and issubclass(base, PreTrainedModel)):
        raise CheckpointError(
            f"{name}: architectures names {names[0]!r}, which is not a model class of transformers"
        )
    try:
        config = CONFIG_MAPPING[kind].from_pretrained(folder, local_files_only=True)
    except (*REFUSALS, StrictDataclassError, OSError, ImportError, MemoryError) as error:
        raise CheckpointError(f"{name}: {error}") from None
    if base.__name__ not in _classes_of(config) and not isinstance(config, base.config_class or ()):
        raise CheckpointError(
            f"{name}: architectures names {names[0]!r}, whose model_type is not {kind!r}"
        )
    return config, getattr(modeling_pruned, names[0]) if names[0].startswith(PREFIX) else base


def check_fields(name: Path, raw: dict[str, Any], bounds: Bounds) -> None:
    """Raises CheckpointError for a number that no model of these tensors can have, for code that
    comes from elsewhere, and for what prunekit does not write.
    """
    for path, value in fields_of(raw):
        field = path.rpartition(".")[2]
        if field in REFUSED and value is not None:
            raise CheckpointError(f"{name}: {path} is not something that prunekit writes")
        if path.startswith("auto_map.") and not str(value).startswith(OWN_CODE):
            raise CheckpointError(f"{name}: {path} is {value!r}, which names code of others")
        if FOREIGN_CODE.search(field) and not str(value).replace("_", "").isalnum():
            raise CheckpointError(f"{name}: {path} is {value!r}, which names code of others")
        share = type(value) in (int, float) and DROPOUT.search(field)
        if share and not 0 <= value <= 1:
            raise CheckpointError(f"{name}: {path} is {value}, which is no share")
        if type(value) is not int or path.startswith("prunekit_layout."):
            continue
        most = LARGEST_NUMBER
        if COUNTS.search(field):
            most = bounds.layers
        elif "expert" in field:
            most = bounds.experts
        elif "head" in field:
            most = bounds.heads
        if value > most or value < (0 if SIZES.search(field) else -LARGEST_NUMBER):
            raise CheckpointError(f"{name}: {path} is {value}, which no model of these tensors has")


def fields_of(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a JSON object under its dotted path, inner objects included."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
        here = f"{path}.{key}" if path else str(key)
        yield here, value
        if isinstance(value, (dict, list)):
            yield from fields_of(value, here)


def build_checked(folder: Path, config: Any, kind: Any) -> nn.Module:
    """The model on the meta device. Raises CheckpointError where there can be none."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        return build_on_meta(kind, config)
    except (*REFUSALS, StrictDataclassError, ImportError, MemoryError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'}: no model can be built from it: {error}"
        ) from None


def check_buffers(folder: Path, model: nn.Module, held: Shapes) -> None:
    """Raises CheckpointError for buffers outside the weights that would take more than those."""
    weights = sum(4 * prod(shape) for shape in held.values())
    for path, buffer in non_persistent_buffers(model):
        size = buffer.numel() * buffer.element_size()
        if size > max(weights, LARGEST_BUFFERS):
            raise CheckpointError(
                f"{folder / 'config.json'}: the buffer {path} would have {size} bytes"
            )


def _classes_of(config: Any) -> tuple[str, ...]:
    """Names of the causal language models that transformers registers for the config."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, ())
    return (found,) if isinstance(found, str) else tuple(found)
