"""What removal did to a model beyond the shapes of its tensors: kept on the model itself, so that
copies of the model have it too.
"""

from __future__ import annotations

import re
from typing import Any, TypedDict, TypeVar

from torch import nn

RECORD = "_prunekit_edits"
"""The attribute of a model that holds its edits."""
T = TypeVar("T")


class Remaining(TypedDict):
    """Which modules of a list are left: those with the numbers `keep` in the unpruned model's list
    of length `of`.
    """

    of: int
    keep: list[int]


class SlicedArgument(TypedDict):
    """A constant that enters a module sliced: along `dim`, of every `size` indices those in `keep`.
    `argument`: its position or keyword.
    """

    argument: int | str
    dim: int
    size: int
    keep: list[int]


class Edits(TypedDict):
    """What a loader has to repeat, as data for JSON.

    attributes, configs: module -> {attribute: value}, of the module, of its own config.
    arguments: module -> constants that enter it sliced.
    lists, blocks: ModuleList -> which of its modules are left.

    Names of modules are those after blocks were dropped.
    """

    attributes: dict[str, dict[str, Any]]
    configs: dict[str, dict[str, Any]]
    arguments: dict[str, list[SlicedArgument]]
    lists: dict[str, Remaining]
    blocks: dict[str, Remaining]


def no_edits() -> Edits:
    return {"attributes": {}, "configs": {}, "arguments": {}, "lists": {}, "blocks": {}}


def edits(model: nn.Module) -> Edits:
    """What all `remove`s did to the model beyond the tensors' shapes, for `rebuild`."""
    found: Edits = vars(model).get(RECORD, no_edits())
    return found


def record(model: nn.Module, new: Edits) -> None:
    """Add the edits of one `remove` (save for dropped blocks) to those that the model has."""
    total = edits(model)
    setattr(model, RECORD, total)
    for before, now in (
        (total["attributes"], new["attributes"]),
        (total["configs"], new["configs"]),
    ):
        for path, values in now.items():
            before.setdefault(path, {}).update(values)
    for path, left in new["lists"].items():
        total["lists"][path] = _still_left(total["lists"].get(path), left)
    for path, arguments in new["arguments"].items():
        total["arguments"].setdefault(path, []).extend(arguments)


def record_blocks(model: nn.Module, path: str, left: Remaining) -> None:
    """Add that blocks of the list `path` were dropped; what is known of the others is from now on
    under their new numbers.
    """
    total = edits(model)
    setattr(model, RECORD, total)
    total["blocks"][path] = _still_left(total["blocks"].get(path), left)
    new = {i: n for n, i in enumerate(left["keep"])}
    total["attributes"] = _renumbered(total["attributes"], path, new)
    total["configs"] = _renumbered(total["configs"], path, new)
    total["arguments"] = _renumbered(total["arguments"], path, new)
    total["lists"] = _renumbered(total["lists"], path, new)


def _still_left(before: Remaining | None, now: Remaining) -> Remaining:
    """`now` counts what `before` left."""
    if before is None:
        return now
    return {"of": before["of"], "keep": [before["keep"][i] for i in now["keep"]]}


def _renumbered(edits: dict[str, T], path: str, new: dict[int, int]) -> dict[str, T]:
    """Keyed by the modules' new names, without those of blocks that are gone."""
    out = {}
    for name, value in edits.items():
        match = re.match(re.escape(path) + r"\.(\d+)(.*)", name)
        if match is None:
            out[name] = value
        elif int(match[1]) in new:
            out[f"{path}.{new[int(match[1])]}{match[2]}"] = value
    return out
