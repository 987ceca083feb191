"""What the package's files say without being imported: which components they register, and which
other files they import.

Listing components and telling whether code has changed need no torch then.
"""

from __future__ import annotations

import ast
import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from prunekit.errors import ConfigError, expanded

ROOT = Path(__file__).parent


@dataclass(frozen=True)
class Listed:
    """One component as its file writes it: where it is, its docstring, options and metadata."""

    name: str
    module: str
    doc: str
    options: dict[str, str]
    """option -> its default as written, "" where there is none."""
    meta: dict[str, Any]
    """Keywords of the registration that are literals."""

    @property
    def summary(self) -> str:
        """First sentence of the docstring, on one line."""
        return first_sentence(self.doc)


def first_sentence(doc: str | None) -> str:
    """The first paragraph up to its first full stop that ends a sentence, on one line."""
    paragraph = " ".join((doc or "").strip().split("\n\n")[0].split())
    head, stop, _ = paragraph.partition(". ")
    return head + "." if stop else paragraph


def tops() -> tuple[Path, ...]:
    """The folders that packages of components lie in: prunekit's own, and the one that
    PRUNEKIT_COMPONENTS names. Raises ConfigError where that one is not there.
    """
    own = os.environ.get("PRUNEKIT_COMPONENTS")
    if not own:
        return (ROOT,)
    folder = expanded(own).resolve()
    if not folder.is_dir():
        raise ConfigError(f"PRUNEKIT_COMPONENTS={own} is no folder")
    return (ROOT, folder)


def components(package: str) -> dict[str, Listed]:
    """Components registered in the files of `prunekit.<package>`, by name. Raises ConfigError for a
    file that is no Python, and for one of the user's that takes the name of a file or component.
    """
    found: dict[str, Listed] = {}
    for top in tops():
        for path in sorted((top / package).glob("*.py")):
            listed = {c.name: c for c in _registered(path, package)}
            if top != ROOT:
                files = {path.name} if (ROOT / package / path.name).is_file() else set()
                for name in sorted(files | (listed.keys() & found.keys())):
                    raise ConfigError(
                        f"{path}: prunekit.{package} has a {name!r} already; call yours otherwise"
                    )
            found |= listed
    return found


@cache
def _registered(path: Path, package: str) -> list[Listed]:
    module = f"prunekit.{package}.{path.stem}"
    nodes = _parsed(path).body
    return [_listed(n, call, module) for n in nodes for call in _registrations(n)]  # type: ignore[arg-type]


def _registrations(node: ast.stmt) -> Iterator[ast.Call]:
    """The `@<registry>.register(...)` decorators of a function."""
    if isinstance(node, ast.FunctionDef):
        for decorator in node.decorator_list:
            if (
                isinstance(decorator, ast.Call)
                and isinstance(decorator.func, ast.Attribute)
                and decorator.func.attr == "register"
            ):
                yield decorator


def _listed(node: ast.FunctionDef, call: ast.Call, module: str) -> Listed:
    meta = {k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)}
    given = call.args[0] if call.args else None
    name = given.value if isinstance(given, ast.Constant) else meta.pop("name", node.name)
    options = {
        a.arg: "" if default is None else ast.unparse(default)
        for a, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    }
    return Listed(str(name), module, ast.get_docstring(node) or "", options, meta)  # type: ignore[arg-type]


@cache
def _parsed(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8"), str(path))
    except (SyntaxError, UnicodeDecodeError) as e:
        line = f", line {e.lineno}" if isinstance(e, SyntaxError) else ""
        raise ConfigError(f"{path}{line}: {e.args[0] if line else e}") from None


def code_hash(modules: Iterable[str]) -> str:
    """SHA-256 of the source of `modules` and of every module of prunekit that they import,
    directly or through others. It holds for a checkout as well as for an installed wheel.
    """
    return _code_hash(frozenset(modules))


@cache
def _code_hash(modules: frozenset[str]) -> str:
    digest = hashlib.sha256()
    for path in sorted(import_closure(modules)):
        top = next(top for top in tops() if path.is_relative_to(top))
        digest.update(f"{path.relative_to(top).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def import_closure(modules: Iterable[str]) -> set[Path]:
    """The files of `modules` and of all modules of prunekit that they import. Raises ValueError
    for a name that is no module of prunekit.
    """
    todo, found = [], set()
    for name in modules:
        path = module_file(name)
        if path is None:
            raise ValueError(f"{name} is no module of prunekit")
        todo.append(path)
    while todo:
        path = todo.pop()
        if path not in found:
            found.add(path)
            todo += imported_files(path)
    return found


@cache
def imported_files(path: Path) -> frozenset[Path]:
    """Files of prunekit that a file imports anywhere in it, functions included."""
    names: set[str] = set()
    for node in ast.walk(_parsed(path)):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return frozenset(f for n in names if (f := module_file(n)) is not None)


def module_file(name: str) -> Path | None:
    """The file of `prunekit.a.b`, also of one that `PRUNEKIT_COMPONENTS` adds; of a package its
    `__init__.py`. None if there is none.
    """
    first, *steps = name.split(".")
    if first != "prunekit" or not steps:
        return None
    places = [top.joinpath(*steps) for top in tops()]
    files = [f for p in places for f in (p.with_suffix(".py"), p / "__init__.py")]
    return next((f for f in files if f.is_file()), None)
