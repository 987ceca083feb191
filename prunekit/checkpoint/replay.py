"""Make a pruned model again from the dense one and the kept indices in `pruning.json`, removed or
only zeroed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunekit.checkpoint.integrity import CheckpointError
from prunekit.checkpoint.manifest import MANIFEST, check_groups, read_manifest
from prunekit.checkpoint.remote_code.runtime_modules import Bypass, insert
from prunekit.errors import ConfigError
from prunekit.types import Kept


def replay(
    dense: nn.Module, source: str | Path | dict[str, Any], *, zeroed: bool = False
) -> nn.Module:
    """Prune `dense` in place as `source` says: a checkpoint folder, a `pruning.json`, or its
    content.

    `zeroed` keeps every shape and sets to zero what would be removed. Weights that a recovery or a
    compensation changed are not in `pruning.json`: the result is the pruned model before these.
    Blocks that became part of others are merged again; sub-layers that went go, or give zeros.
    Raises ConfigError where the model has other groups or units, and where none is named.
    """
    from prunekit import graph
    from prunekit.graph.merging import checked_merges, merge_blocks

    manifest, file = _manifest(source)
    check_groups(manifest.get("groups"), file)
    if not any(manifest.get(field) for field in ("groups", "merges", "bypassed")):
        raise ConfigError(
            f"{file} names no units to remove: what was done to the model (a rotation, factors, "
            "early exits) is in the checkpoint alone; prunekit.load reads it"
        )
    groups = graph.discover(dense)
    have = {g.name: g.units for whole in groups for g in (whole, *whole.parts)}
    for name, entry in manifest["groups"].items():
        units = have.get(name)
        if units is None and entry.get("kind") != "weights":
            raise ConfigError(
                f"groups[{name!r}] is not in this model, which has {', '.join(list(have)[:6])} …; "
                "is it the dense one?"
            )
        if units != entry["units"] and entry.get("kind") != "weights":
            raise ConfigError(
                f"groups[{name!r}] has {entry['units']} units, in this model it has {units}; is it "
                "the dense one?"
            )
    kept = kept_masks(manifest, file)
    merge_blocks(dense, checked_merges(manifest.get("merges", []), file))
    bypassed = checked_bypassed(manifest.get("bypassed", {}), dense, file)
    some = {name: mask for name, mask in kept.items() if not bool(mask.all())}
    if bypassed:
        some = {name: mask for name, mask in some.items() if bool(mask.any())}
    if zeroed:
        graph.zero(dense, some)
    else:
        graph.remove(dense, some, norm=_norm(manifest))
    for path, outputs in bypassed.items():
        if zeroed:
            with torch.no_grad():
                for p in dense.get_submodule(path).parameters():
                    p.zero_()
        else:
            insert(dense, path, Bypass(outputs))
    return dense


def checked_bypassed(value: Any, model: nn.Module, name: str) -> dict[str, int]:
    """Path of each sub-layer that went -> outputs of what is in its place. Raises CheckpointError
    naming the field for anything else.
    """
    modules = dict(model.named_modules())
    field = f"{name}: bypassed"
    if not isinstance(value, dict):
        raise CheckpointError(f"{field} must be a mapping")
    for path, outputs in value.items():
        if not path or path not in modules:
            raise CheckpointError(f"{field}: the model has no sub-layer {path!r}")
        if type(outputs) is not int or not 1 <= outputs <= 16:
            raise CheckpointError(f"{field}[{path!r}] is {outputs!r}; possible: 1 to 16")
    return value


def kept_masks(manifest: dict[str, Any], name: str) -> Kept:
    """Group -> bool mask over its units. Raises CheckpointError naming file and field for a damaged
    manifest.
    """
    groups: Any = manifest.get("groups")
    check_groups(groups, name)
    masks = {}
    for group, entry in groups.items():
        if entry.get("kind") == "weights":
            raise ConfigError(
                f"{name}: groups[{group!r}] is a mask over single weights, whose zeros are in the "
                "checkpoint's tensors only"
            )
        masks[group] = torch.zeros(entry["units"], dtype=torch.bool)
        masks[group][entry["kept"]] = True
    return masks


def _norm(manifest: dict[str, Any]) -> Any:
    """How the run treated norms over removed channels."""
    pruner = (manifest.get("config") or {}).get("pruner") or {}
    return pruner.get("norm", "plain") if isinstance(pruner, dict) else "plain"


def _manifest(source: str | Path | dict[str, Any]) -> tuple[dict[str, Any], str]:
    if isinstance(source, dict):
        return source, "the given content"
    path = Path(source)
    path = path / MANIFEST if path.is_dir() else path
    return read_manifest(path), str(path)
