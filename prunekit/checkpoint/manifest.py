"""`pruning.json`: what was pruned and how, what the folder holds, and a seal over all of it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from prunekit.checkpoint import bitmask
from prunekit.checkpoint.companions import check_companions
from prunekit.checkpoint.folder import check_files, check_own, inside
from prunekit.checkpoint.integrity import CheckpointError, digest, read_json, seal
from prunekit.types import Group, Kept

MANIFEST = "pruning.json"
VERSION = 1
WEIGHTS = ".safetensors"


def build_manifest(
    folder: Path,
    kept: Kept,
    groups: list[Group],
    *,
    config: dict[str, Any],
    counts: dict[str, Any],
    layout: dict[str, Any],
    merges: Sequence[Mapping[str, Any]],
    bypassed: Mapping[str, int],
    blocks: Mapping[str, Any],
) -> dict[str, Any]:
    """What `pruning.json` says of the files in `folder`, the groups and the run that made them.

    Args:
        config: the run's configuration.
        counts: what was measured.
        layout: as config.json has it; {} where transformers' own class loads the folder.
        merges: blocks that became part of others.
        bypassed: path of each sub-layer that went -> outputs of what is in its place.
        blocks: path of a list of blocks -> which of them are left.
    """
    entries: dict[str, Any] = {}
    for group in groups:
        entries[group.name] = {
            "kind": group.kind,
            "layer": group.layer,
            "units": group.units,
            "members": [[m.param, m.axis] for m in group.members]
            or list(group.modules or [group.matrix]),
            "kept": _kept_units(kept.get(group.name), group),
        }
    for name, mask in kept.items():
        if name not in entries and mask.dim() == 1:
            entries[name] = {
                "kind": name.split(".")[0],
                "layer": None,
                "units": mask.numel(),
                "kept": mask.nonzero()[:, 0].tolist(),
            }
    if any(folder.glob("*" + bitmask.ENDING)):
        loader = "prunekit.load"
    elif layout:
        loader = "prunekit.load, or from_pretrained(path, trust_remote_code=True)"
    else:
        loader = "from_pretrained(path)"
    changes = {
        "merges": [dict(m) for m in merges],
        "bypassed": dict(bypassed),
        "blocks": dict(blocks),
    }
    return {
        "version": VERSION,
        "loads_with": loader,
        "config": config,
        "counts": counts,
        "groups": entries,
        **{name: value for name, value in changes.items() if value},
        "files": {file.name: digest(file) for file in sorted(folder.iterdir()) if file.is_file()},
    }


def _kept_units(mask: torch.Tensor | None, group: Group) -> list[int] | int:
    """Kept units in ascending order; for a matrix of weights only how many, since the zeros are in
    the tensor itself.
    """
    if group.kind == "weights":
        return int(mask.sum()) if mask is not None else group.units
    if mask is None:
        return list(range(group.units))
    units: list[int] = mask.flatten().nonzero()[:, 0].tolist()
    return units


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Seal the manifest and write it; values that JSON does not know become strings."""
    plain = json.loads(json.dumps(manifest, default=str))
    plain["seal"] = seal(plain)
    (folder / MANIFEST).write_text(json.dumps(plain, separators=(",", ":")), encoding="utf-8")


def read_manifest(file: Path) -> dict[str, Any]:
    """The content of a `pruning.json`. Raises CheckpointError where it is not what was written."""
    manifest = read_json(file)
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{file}: version is {manifest.get('version')!r}, this prunekit reads {VERSION}"
        )
    if manifest.get("seal") != seal(manifest):
        raise CheckpointError(
            f"{file}: seal does not match the content; the file was changed or damaged"
        )
    return manifest


def check_manifest(folder: Path) -> dict[str, Any]:
    """`pruning.json`, checked field by field; every file that it lists is there, and those without
    weights match their hash. `check_weights` compares the others.

    Raises CheckpointError naming the file and the field. Nothing but JSON and bytes is read.
    """
    check_files(folder)
    manifest, name = read_manifest(folder / MANIFEST), str(folder / MANIFEST)
    files = manifest.get("files")
    if (
        not isinstance(files, dict)
        or "config.json" not in files
        or not any(str(f).endswith(WEIGHTS) for f in files)
    ):
        raise CheckpointError(f"{name}: files must list config.json and the safetensors")
    check_groups(manifest.get("groups"), name)
    for file, expected in files.items():
        path = inside(folder, file, f"{name}: files")
        if not path.is_file():
            raise CheckpointError(f"{name}: files lists {file}, which is missing in {folder}")
        if not file.endswith(WEIGHTS):
            check_hash(path, expected)
    check_own(folder, files)
    check_companions(folder, files)
    return manifest


def check_weights(folder: Path, manifest: dict[str, Any]) -> None:
    """Raises CheckpointError for a file of weights that does not match its hash. All of it is
    read: so first see that its header fits.
    """
    for file, expected in manifest["files"].items():
        if file.endswith(WEIGHTS):
            check_hash(folder / file, expected)


def check_hash(path: Path, expected: Any) -> None:
    """Raises CheckpointError for a file that is not the one which was written."""
    if digest(path) != expected:
        raise CheckpointError(
            f"{path}: its SHA-256 is not the one in {MANIFEST}; the file was changed or damaged"
        )


def check_groups(groups: Any, name: str) -> None:
    """Raises CheckpointError for a group whose kept indices are not ascending integers below its
    number of units.
    """
    if not isinstance(groups, dict):
        raise CheckpointError(f"{name}: groups must be an object, found {type(groups).__name__}")
    for group, entry in groups.items():
        field = f"{name}: groups[{group!r}]"
        if not isinstance(entry, dict) or type(entry.get("units")) is not int or entry["units"] < 1:
            raise CheckpointError(f"{field}.units must be a positive integer")
        kept = entry.get("kept")
        if entry.get("kind") == "weights":
            if type(kept) is not int or not 0 <= kept <= entry["units"]:
                raise CheckpointError(f"{field}.kept must be a number of units")
            continue
        if not isinstance(kept, list) or any(type(k) is not int for k in kept):
            raise CheckpointError(f"{field}.kept must be a list of integers")
        if any(not 0 <= k < entry["units"] for k in kept):
            raise CheckpointError(
                f"{field}.kept: index out of range, there are {entry['units']} units"
            )
        if any(a >= b for a, b in itertools.pairwise(kept)):
            raise CheckpointError(f"{field}.kept must ascend without repeats")
