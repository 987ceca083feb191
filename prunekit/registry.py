"""Registries of components: a component is a plain function, its keyword-only parameters are its
options.

`@criteria.register()` on `def taylor(model, groups, run, *, mode: Literal[...] = "param_first")`
makes `criterion=taylor` work. `criteria.build({"name": "taylor", "mode": "vectorize"})` checks
names and values against the signature and returns a partial.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Annotated, Any, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from prunekit.errors import ConfigError

Share = Annotated[float, Field(ge=0, lt=1)]
"""A share of something that is removed: 0 <= share < 1."""
Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Entry:
    """One registered component: its function, the types and defaults of its options, and free
    metadata.
    """

    name: str
    fn: Callable[..., Any]
    types: dict[str, Any]
    defaults: dict[str, Any]
    meta: dict[str, Any]

    @property
    def summary(self) -> str:
        """First sentence of the docstring."""
        return " ".join((inspect.getdoc(self.fn) or "").split("\n\n")[0].split())


class Registry:
    """Components of one kind, filled on first use by importing every module of
    `prunekit.<package>`.
    """

    def __init__(self, kind: str, package: str):
        self.kind, self.package = kind, package
        self._entries: dict[str, Entry] = {}
        self._loaded = False

    def register(
        self, name: str | None = None, **meta: Any
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator: file the function under `name` (default: its own name). Raises ValueError if
        the name is taken.
        """

        def decorate(fn: Callable[..., Any]) -> Callable[..., Any]:
            key = name or fn.__name__
            if key in self._entries and self._entries[key].fn.__module__ != fn.__module__:
                raise ValueError(
                    f"{self.kind} {key!r} is registered twice: {self._entries[key].fn.__module__} "
                    f"and {fn.__module__}"
                )
            hints = get_type_hints(fn, include_extras=True)
            options = [
                p for p in inspect.signature(fn).parameters.values() if p.kind is p.KEYWORD_ONLY
            ]
            self._entries[key] = Entry(
                key,
                fn,
                {p.name: hints.get(p.name, Any) for p in options},
                {p.name: p.default for p in options},
                meta,
            )
            return fn

        return decorate

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        package = importlib.import_module(f"prunekit.{self.package}")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")

    def names(self) -> list[str]:
        self._load()
        return sorted(self._entries)

    def entry(self, name: str) -> Entry:
        """Raises ConfigError naming what there is."""
        self._load()
        if name not in self._entries:
            near = get_close_matches(str(name), self._entries, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"no {self.kind} called {name!r}.{hint} There are: {', '.join(self.names())}"
            )
        return self._entries[name]

    def build(self, node: dict[str, Any]) -> partial[Any]:
        """Checked options bound to the component that `node["name"]` names.

        Raises ConfigError for an unknown name, an unknown or missing option, or a value of the
        wrong type or range.
        """
        if not isinstance(node, dict) or "name" not in node:
            raise ConfigError(
                f"{self.kind} must be a mapping with a `name`, got {node!r}. There are: "
                f"{', '.join(self.names())}"
            )
        entry = self.entry(node["name"])
        given = {k: v for k, v in node.items() if k != "name"}
        for option in given:
            if option not in entry.types:
                possible = ", ".join(entry.types) or "none"
                raise ConfigError(
                    f"{self.kind}={entry.name} has no option {option!r}. Options: {possible}"
                )
        missing = [
            k
            for k, v in entry.defaults.items()
            if v is inspect.Parameter.empty and given.get(k) is None
        ]
        if missing:
            raise ConfigError(f"{self.kind}={entry.name} needs {', '.join(missing)}")
        return partial(entry.fn, **{k: self._checked(entry, k, v) for k, v in given.items()})

    def _checked(self, entry: Entry, option: str, value: Any) -> Any:
        try:
            return TypeAdapter(
                entry.types[option], config=ConfigDict(arbitrary_types_allowed=True)
            ).validate_python(value)
        except ValidationError as e:
            what = "; ".join(err["msg"] for err in e.errors())
            raise ConfigError(f"{self.kind}={entry.name}: {option}={value!r}: {what}") from None


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
