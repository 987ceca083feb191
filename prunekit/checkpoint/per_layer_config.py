"""Fields of a config that differ by layer: found from sizes, written into `per_layer_config`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from prunekit.checkpoint.class_sizes import Rows, edited, rows_of_config
from prunekit.checkpoint.config_fit import Fit


def fit_layers(
    kind: type, config: Any, target: Rows, layers: Sequence[str], inert: set[str]
) -> dict[int, dict[str, int]]:
    """Fields that differ by layer: index -> {field: value}, for the layers whose module paths are
    given.

    The class is built until it has shown which sizes follow a field; the other layers' values come
    from their sizes.
    """
    found: dict[int, dict[str, int]] = {}
    effects: dict[str, tuple[int, Rows]] = {}
    start = rows_of_config(kind, config) or {}
    for i, path in enumerate(layers):
        edits = infer_edits(_within(start, path), _within(target, path), effects)
        if edits is None:
            one = Fit(kind, config, target, path + ".", inert).run()
            edits = one.edits
            for field in (f for f in edits if f not in effects):
                effect = _effect(kind, config, field, edits[field], path, start)
                effects[field] = (_value(config, field), effect)
        if edits:
            found[i] = edits
    return found


def infer_edits(
    have: Rows, want: Rows, effects: dict[str, tuple[int, Rows]]
) -> dict[str, int] | None:
    """Values of the known fields that account for every size that is not as wanted; None where they
    do not.
    """
    wrong = {k for k, v in want.items() if type(k[1]) is int and have.get(k) != v}
    edits: dict[str, int] = {}
    for field, (value, rows_of_field) in effects.items():
        ratios = {Fraction(want[k], have[k]) for k in rows_of_field if k in want and have.get(k)}
        if len(ratios) == 1 and (ratio := ratios.pop()) != 1 and (value * ratio).denominator == 1:
            edits[field] = int(value * ratio)
            wrong -= set(rows_of_field)
    return None if wrong else edits


def _within(found: Rows, path: str) -> Rows:
    return {
        (name[len(path) :], place): v
        for (name, place), v in found.items()
        if name.startswith(path + ".")
    }


def _value(config: Any, field: str) -> int:
    value: int = config.get_text_config()._getattr_without_heterogeneous_validation(field, 0)
    return value


def _effect(kind: type, config: Any, field: str, value: int, path: str, start: Rows) -> Rows:
    """The sizes of a layer that are in proportion to the field."""
    before = _within(start, path)
    after = _within(rows_of_config(kind, edited(config, **{field: value})) or {}, path)
    ratio = Fraction(value, _value(config, field) or 1)
    return {
        k: v
        for k, v in after.items()
        if type(k[1]) is int and v != before.get(k) and Fraction(v, before.get(k, 1)) == ratio
    }


def with_layers(
    kind: type, config: Any, layers: dict[int, dict[str, Any]], readable: bool = True
) -> Any | None:
    """The config with `per_layer_config` added, without the fields that its class refuses; None
    where nothing remains.

    `readable` lets code that knows nothing of layers read the fields from the config as a whole.
    """
    fields = sorted({f for one in layers.values() for f in one})
    access = {"allow_global_per_layer_attribute_access": True} if readable else {}
    for refused in itertools.chain.from_iterable(
        itertools.combinations(fields, n) for n in range(len(fields))
    ):
        chosen = {
            i: {f: v for f, v in one.items() if f not in refused} for i, one in layers.items()
        }
        edits: dict[str, Any] = {"per_layer_config": {i: one for i, one in chosen.items() if one}}
        made = edited(config, **edits, **access)
        if rows_of_config(kind, made) is not None:
            return made
    return None


def layers_of_config(config: Any) -> dict[int, dict[str, Any]]:
    """What a config says of single layers already: index -> {field: value}."""
    given = config.get_text_config().to_dict().get("per_layer_config") or {}
    return {int(i): dict(one) for i, one in given.items()}
