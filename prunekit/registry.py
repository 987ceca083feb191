"""Registries of components: a component is a plain function, its keyword-only parameters are its
options.

`@criteria.register()` on `def taylor(model, groups, run, *, mode: Literal[...] = "param_first")`
makes `criterion=taylor` work. `criteria.build({"name": "taylor", "mode": "vectorize"})` checks
names and values against the signature and returns a `Component`: the function with its options.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, get_type_hints

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from prunekit import source
from prunekit.errors import ConfigError

Share = Annotated[float, Field(ge=0, lt=1)]
"""A share of something that is removed: 0 <= share < 1."""
LARGEST = 2**31 - 1
"""More than any number of tokens, units or steps; beyond it lie typos and overflows."""
Positive = Annotated[int, Field(gt=0, le=LARGEST)]
Natural = Annotated[int, Field(ge=0, le=LARGEST)]
Above = Annotated[float, Field(gt=0)]
"""More than nothing."""
LearningRate = Annotated[float, Field(gt=0, le=1)]
"""Of Adam, which moves a parameter by about as much a step: more than 1 learns nothing."""
Length = Annotated[int, Field(ge=2, le=LARGEST)]
"""Tokens side by side: of one alone nothing is predicted."""
Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""What every generator takes."""

Function = Callable[..., Any]


def built(kind: str, node: Any) -> Component:
    """The component of that kind; one that is built already is passed on."""
    return node if isinstance(node, Component) else REGISTRIES[kind].build(node)


def _ratio(node: Any) -> Component | None:
    return None if node is None else built("ratio", node)


InnerRatio = Annotated[Any, BeforeValidator(_ratio)]
"""An option that is another ratio, null for none."""


@dataclass(frozen=True)
class Entry:
    """One registered function: the types and defaults of its options, and metadata."""

    name: str
    fn: Function
    types: dict[str, Any]
    defaults: dict[str, Any]
    meta: dict[str, Any]

    @property
    def summary(self) -> str:
        """First sentence of the docstring."""
        return source.first_sentence(inspect.getdoc(self.fn))


@dataclass(frozen=True)
class Component:
    """A registered function with checked options, those left at their defaults included."""

    entry: Entry
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def meta(self) -> dict[str, Any]:
        return self.entry.meta

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.entry.fn(*args, **{**self.options, **kwargs})


def checked_values(what: str, given: dict[str, Any], types: dict[str, Any]) -> dict[str, Any]:
    """The values as their types read them. Raises ConfigError for a key without a type, and for a
    value that is not of it.
    """
    # Strict: `true` is no number of samples, and "10" in quotes is a mistake.
    rules = ConfigDict(arbitrary_types_allowed=True, strict=True, allow_inf_nan=False)
    found = {}
    for option, value in given.items():
        if option not in types:
            raise ConfigError(
                f"{what} has no option {option!r}. Options: {', '.join(types) or 'none'}"
            )
        adapter: TypeAdapter[Any] = TypeAdapter(types[option], config=rules)
        try:
            found[option] = adapter.validate_python(value)
        except ValidationError as e:
            words = "; ".join(dict.fromkeys(in_words(err, value) for err in e.errors()))
            raise ConfigError(f"{what}: {option}={value!r}: {words}".removeprefix(": ")) from None
    return found


def in_words(error: Any, value: Any) -> str:
    """What pydantic says of a value, with an example where its form alone is wrong."""
    words: str = error["msg"].removeprefix("Value error, ").replace("Input should", "it should")
    if error["type"] == "list_type" and isinstance(value, str):
        return f"{words}, e.g. [{value}]"
    percent = isinstance(value, str) and value.endswith("%")
    if error["type"] == "less_than" and error["ctx"]["lt"] == 1 and 1 < error["input"] < 100:
        return f"{words}, e.g. {error['input'] / 100:g} for {error['input']:g}%"
    return f"{words}, e.g. 0.3 for 30%" if percent else words


class Registry:
    """Components of one kind. A component's file is imported when it is first asked for; which
    components there are is read off the files.
    """

    def __init__(self, kind: str, package: str):
        self.kind, self.package = kind, package
        self._entries: dict[str, Entry] = {}

    def register(self, name: str | None = None, **meta: Any) -> Callable[[Function], Function]:
        """Decorator: file the function under `name` (default: its own name).

        Raises ValueError if the name is taken by another module.
        """

        def decorate(fn: Function) -> Function:
            key = name or fn.__name__
            known = self._entries.get(key)
            if known and known.fn.__module__ != fn.__module__:
                raise ValueError(
                    f"{self.kind} {key!r} is registered twice: {known.fn.__module__} "
                    f"and {fn.__module__}"
                )
            hints = get_type_hints(fn, include_extras=True)
            parameters = inspect.signature(fn).parameters.values()
            options = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
            self._entries[key] = Entry(
                key,
                fn,
                {p.name: hints.get(p.name, Any) for p in options},
                {p.name: p.default for p in options},
                meta,
            )
            return fn

        return decorate

    def names(self) -> list[str]:
        return sorted({*self._entries, *source.components(self.package)})

    def entry(self, name: str) -> Entry:
        """Raises ConfigError naming what there is."""
        listed = source.components(self.package).get(name)
        if listed is not None and name not in self._entries:
            self._import(listed.module)
        if name not in self._entries:
            near = get_close_matches(str(name), self.names(), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"no {self.kind} called {name!r}.{hint} There are: {', '.join(self.names())}"
            )
        return self._entries[name]

    def _import(self, module: str) -> None:
        """A component's file; those of PRUNEKIT_COMPONENTS count as part of the package."""
        places = importlib.import_module(f"prunekit.{self.package}").__path__
        own = [str(top / self.package) for top in source.tops()[1:]]
        places.extend(p for p in own if p not in places)
        importlib.import_module(module)

    def build(self, node: dict[str, Any]) -> Component:
        """The component that `node["name"]` names, with the options that stand beside it.

        Raises ConfigError for an unknown name, an unknown or missing option, or a value of the
        wrong type or range.
        """
        if not isinstance(node, dict) or not isinstance(node.get("name"), str):
            raise ConfigError(
                f"{self.kind} must be a mapping with a `name`, got {node!r}. "
                f"There are: {', '.join(self.names())}"
            )
        entry = self.entry(node["name"])
        given = {k: v for k, v in node.items() if k != "name"}
        required = [k for k, v in entry.defaults.items() if v is inspect.Parameter.empty]
        missing = [k for k in required if given.get(k) is None]
        if missing:
            where = "" if self.kind == "eval" else f"; give {self.kind}.{missing[0]}=..."
            raise ConfigError(f"{self.kind}={entry.name} needs {', '.join(missing)}{where}")
        checked = checked_values(f"{self.kind}={entry.name}", given, entry.types)
        return Component(entry, {**entry.defaults, **checked})


def draw(calib: Component, tokenizer: Any, model: Any) -> Any:
    """The tokens of a calib, which is handed the dense model too if it is registered with
    `needs="model"`. `(N, T)` int64, or several by name. Raises ConfigError.
    """
    if calib.meta.get("needs") == "model":
        return calib(tokenizer, model)
    return calib(tokenizer)


models = Registry("model", "models")
calibs = Registry("calib", "calibs")
criteria = Registry("criterion", "criteria")
ratios = Registry("ratio", "ratios")
excludes = Registry("exclude", "excludes")
pruners = Registry("pruner", "pruners")
recoveries = Registry("recovery", "recoveries")
evals = Registry("eval", "evals")

REGISTRIES = {
    r.kind: r for r in (models, calibs, criteria, ratios, excludes, pruners, recoveries, evals)
}
