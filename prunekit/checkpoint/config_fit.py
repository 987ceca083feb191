"""Which config makes transformers' own class build a model of these shapes: found by asking the
class, no table of architectures.

Values are proposed from the ratio between the sizes that a config gives and the sizes that are
wanted; the class builds itself on the meta device (0.02 s for 7 billion parameters) and what it
built is compared, tensor by tensor and number by number.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from typing import Any

from torch import nn

from prunekit.checkpoint.layout import (
    clean_config,
    difference,
    fresh,
    numbers,
    stock_class,
    tensors,
)
from prunekit.errors import ConfigError

REFUSALS = (
    ValueError,
    TypeError,
    RuntimeError,
    AssertionError,
    AttributeError,
    LookupError,
    ArithmeticError,
)
"""What model classes raise when a config asks for something that they cannot build."""
Rows = dict[tuple[str, int | str], Any]
"""(tensor, axis) -> size, and (module, attribute) -> number."""


def rows(model: nn.Module) -> Rows:
    """Every size and every number of a model, without those of run-time modules, of which no
    config tells.
    """
    from prunekit.checkpoint.remote_code.runtime_modules import kind_of

    added = tuple(f"{n}." for n, m in model.named_modules() if kind_of(m) is not None)
    found: Rows = {
        (name, axis): size
        for name, t in tensors(model).items()
        for axis, size in enumerate(t.shape)
        if not name.startswith(added)
    }
    for path, module in model.named_modules():
        if not f"{path}.".startswith(added):
            found.update({(path, "." + k): v for k, v in numbers(module).items()})
    return found


def edited(config: Any, **edits: Any) -> Any | None:
    """The config with some fields changed, as reading it from a file would give it; None where its
    class refuses the values.
    """
    from huggingface_hub.errors import StrictDataclassError

    plain = config.to_dict()
    text = config.get_text_config()
    inner = (
        next((k for k, v in vars(config).items() if v is text), None)
        if text is not config
        else None
    )
    target = plain if inner is None else plain[inner]
    target.update({text.attribute_map.get(k, k): v for k, v in edits.items()})
    try:
        made = type(config).from_dict(plain)
    except (*REFUSALS, StrictDataclassError):
        return None
    made._attn_implementation, made._experts_implementation = (
        config._attn_implementation,
        config._experts_implementation,
    )
    return made


def acceptable(kind: type, config: Any, reach: int = 256) -> Any:
    """The config, or where its class refuses it the one with a single size raised by the least that
    the class accepts.

    Removal writes the true sizes into the config, and `hidden_size` 47 with 6 heads is true but
    refused. Raises ConfigError where no such change helps.
    """
    if built(kind, edited(config)) is not None:
        return config
    fields = {
        k: v
        for k, v in vars(config.get_text_config()).items()
        if type(v) is int and v > 1 and not k.startswith("_")
    }
    for more, (field, value) in itertools.product(range(1, reach), fields.items()):
        made = edited(config, **{field: value + more})
        if made is not None and built(kind, made) is not None:
            return made
    raise ConfigError(
        f"{type(config).__name__} refuses the sizes of the pruned model, and raising one of them "
        "does not help"
    )


def built(kind: type, config: Any | None) -> Rows | None:
    """Rows of the model that class `kind` builds from the config; None where it refuses."""
    from transformers.initialization import no_init_weights

    if config is None:
        return None
    try:
        with no_init_weights():  # half of the time, even on the meta device
            return rows(fresh(kind, config))
    except REFUSALS:
        return None


def accepts(kind: type, config: Any, **edits: Any) -> dict[str, tuple[int, ...]] | None:
    """Shapes of all tensors if the class takes the config with these fields changed, else None; no
    weights are allocated.
    """
    changed = edited(config, **edits)
    if changed is None:
        return None
    try:
        return {name: tuple(t.shape) for name, t in tensors(fresh(kind, changed)).items()}
    except REFUSALS:
        return None


def stock_config(model: nn.Module) -> Any | None:
    """The config from which transformers' own class builds this very model, or None where there is
    none.

    Equal are all names and shapes, all numbers that modules keep and that still mean something, and
    all buffers outside the weights.
    """
    kind, config = stock_class(model), clean_config(model.config)
    for found in (lambda: config, lambda: fit(kind, config, rows(model)).config):
        made = found()
        if edited(made) is not None and plain(model, made):
            return made
    return None


def plain(model: nn.Module, config: Any) -> bool:
    """Whether transformers' own class builds the model from the config, up to numbers that only
    mirror a field of it.
    """
    try:
        return not difference(model, config, mirrored(model, config), own_configs=False)
    except ConfigError:
        return False


def mirrored(model: nn.Module, config: Any) -> frozenset[str]:
    """Integers of modules that removal left as they were, where the class would have set them from
    a field: asked of the class.

    Such a number plays no part in the forward pass (discovery changes those that do), and the
    class's own value is the true one.
    """
    kind, names, asked = stock_class(model), [], {}
    own = {path: numbers(module) for path, module in fresh(kind, config).named_modules()}
    fields = {
        k: v
        for k, v in vars(config.get_text_config()).items()
        if type(v) is int and not k.startswith("_")
    }
    for path, module in model.named_modules():
        for leaf, mine in numbers(module).items():
            stock = own.get(path, {}).get(leaf)
            if type(mine) is not int or type(stock) is not int or mine == stock:
                continue
            key = (re.sub(r"\.\d+", "", path), leaf, mine, stock)
            if key not in asked:
                tries = (
                    built(kind, edited(config, **{f: mine})) or {}
                    for f, v in fields.items()
                    if v == stock
                )
                asked[key] = any(found.get((path, "." + leaf)) == mine for found in tries)
            if asked[key]:
                names.append(f"{path}.{leaf}" if path else leaf)
    return frozenset(names)


class Fit:
    """A config on its way to the wanted rows: edits so far, which rows are still wrong, and which
    fields do nothing.

    `wrong` counts (rows that must be right, integers that have the value of before the edits): the
    second kind are leftovers of removal, or a sign that another field should have been edited.
    """

    def __init__(
        self, kind: type, config: Any, target: Rows, prefix: str = "", inert: set[str] | None = None
    ):
        self.kind, self.config, self.prefix = kind, config, prefix
        self.target = {k: v for k, v in target.items() if k[0].startswith(prefix)}
        self.edits: dict[str, int] = {}
        self.inert = set(inert or ())
        self.rows = self.before = self._built(config) or {}
        self.wrong = self._wrong(self.rows)

    def _built(self, config: Any | None) -> Rows | None:
        found = built(self.kind, config)
        return (
            None
            if found is None
            else {k: v for k, v in found.items() if k[0].startswith(self.prefix)}
        )

    def _wrong(self, found: Rows) -> tuple[int, int]:
        far = [k for k, v in self.target.items() if found.get(k) != v]
        leftover = sum(
            type(k[1]) is str
            and type(self.target[k]) is int
            and self.before.get(k) == self.target[k]
            for k in far
        )
        return len(far) - leftover + sum(k not in self.target for k in found), leftover

    def ratios(self) -> list[Fraction]:
        """Wanted over built size, the most frequent ones first."""
        pairs: Counter[Fraction] = Counter()
        for key, want in self.target.items():
            have = self.rows.get(key)
            if type(want) is int and type(have) is int and want > 0 and have > 0 and want != have:
                pairs[Fraction(want, have)] += 1
        return [ratio for ratio, _ in pairs.most_common(4)]

    def proposals(self, only: set[str] | None = None) -> Iterator[tuple[str, int]]:
        """Fields and values worth asking for."""
        text = self.config.get_text_config()
        fields = {
            k: v
            for k, v in vars(text).items()
            if type(v) is int and v > 0 and not k.startswith("_") and not k.endswith("token_id")
        }
        sizes = {v for (_, k), v in self.target.items() if k == ".head_dim"}
        if "head_dim" not in fields and sizes:
            fields["head_dim"] = 0  # many classes read it where their config does not declare it
        for field, value in fields.items():
            if field in self.inert or (only is not None and field not in only):
                continue
            wanted = (
                sizes
                if field == "head_dim"
                else {int(value * r) for r in self.ratios() if (value * r).denominator == 1}
            )
            yield from ((field, v) for v in sorted(wanted, reverse=True) if v != value)

    def attempt(self, edits: dict[str, int]) -> tuple[tuple[int, int], Any, Rows] | None:
        """How many rows would be wrong after more edits; None where the class refuses them."""
        config = edited(self.config, **edits)
        found = self._built(config)
        if found is None:
            return None
        if found == self.rows and len(edits) == 1:
            self.inert |= set(edits)
        return self._wrong(found), config, found

    def best(self, choices: Iterable[dict[str, int]]) -> bool:
        """Take the choice that leaves the fewest rows wrong, if that is fewer than now."""
        won: tuple[tuple[int, int], Any, Rows] | None = None
        taken: dict[str, int] = {}
        for edits in choices:
            result = self.attempt(edits)
            if result is not None and result[0] < (won[0] if won else self.wrong):
                won, taken = result, edits
            if won is not None and won[0] == (0, 0):
                break
        if won is None:
            return False
        self.wrong, self.config, self.rows = won
        self.edits |= taken
        return True

    def run(self, only: set[str] | None = None) -> Fit:
        """Edit one field at a time while that helps, then two at a time where only both together
        are accepted.
        """
        while self.wrong != (0, 0):
            if self.best({f: v} for f, v in self.proposals(only)):
                continue
            live = [{f: v} for f, v in self.proposals(only)][:12]
            if not self.best(a | b for a, b in itertools.combinations(live, 2) if set(a) != set(b)):
                break
        return self


def fit(kind: type, config: Any, target: Rows) -> Fit:
    """The config nearest to the wanted rows that the class accepts, the same for all layers."""
    return Fit(kind, config, target).run()


def fit_layers(
    kind: type, config: Any, target: Rows, layers: list[str], inert: set[str]
) -> dict[int, dict[str, int]]:
    """Fields that differ by layer: index -> {field: value}, for the layers whose module paths are
    given.

    The class is asked until it has shown which sizes follow a field; the other layers' values come
    from their sizes.
    """
    found: dict[int, dict[str, int]] = {}
    effects: dict[str, tuple[int, Rows]] = {}
    start = built(kind, config) or {}
    for i, path in enumerate(layers):
        edits = explained(_within(start, path), _within(target, path), effects)
        if edits is None:
            one = Fit(kind, config, target, path + ".", inert).run()
            edits = one.edits
            for field in edits:
                effects.setdefault(
                    field,
                    (
                        _value(config, field),
                        _effect(kind, config, field, edits[field], path, start),
                    ),
                )
        if edits:
            found[i] = edits
    return found


def explained(
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
    return config.get_text_config()._getattr_without_heterogeneous_validation(field, 0)


def _effect(kind: type, config: Any, field: str, value: int, path: str, start: Rows) -> Rows:
    """The sizes of a layer that are in proportion to the field."""
    before, after = (
        _within(start, path),
        _within(built(kind, edited(config, **{field: value})) or {}, path),
    )
    ratio = Fraction(value, _value(config, field) or 1)
    return {
        k: v
        for k, v in after.items()
        if type(k[1]) is int and v != before.get(k) and Fraction(v, before.get(k, 1)) == ratio
    }


def layer_paths(model: nn.Module) -> list[str]:
    """Module paths of the decoder layers: the outermost longest list of modules."""
    lists = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        return []
    path, modules = max(lists, key=lambda item: (len(item[1]), -item[0].count(".")))
    return [f"{path}.{i}" for i in range(len(modules))]


def with_layers(
    config: Any,
    layers: dict[int, dict[str, Any]],
    allowed: Callable[[Any], bool],
    readable: bool = True,
) -> Any | None:
    """The config with `per_layer_config` added, without the fields that its class refuses; None
    where nothing remains.

    `readable` lets code that knows nothing of layers read the fields from the config as a whole.
    """
    fields = sorted({f for one in layers.values() for f in one})
    for refused in itertools.chain.from_iterable(
        itertools.combinations(fields, n) for n in range(len(fields))
    ):
        chosen = {
            i: {f: v for f, v in one.items() if f not in refused} for i, one in layers.items()
        }
        edits: dict[str, Any] = {"per_layer_config": {i: one for i, one in chosen.items() if one}}
        made = edited(
            config,
            **edits,
            **({"allow_global_per_layer_attribute_access": True} if readable else {}),
        )
        if made is not None and allowed(made):
            return made
    return None
