"""Who may import whom: packages import downward only, components never each other, and what is
heavy waits until it is needed.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from paths import ROOT

from prunekit.registry import REGISTRIES
from prunekit.source import components, imported_files

METHODS = "problem solvers selection scoring training checkpoint activations data graph architecture registry types errors"  # noqa: E501  (a table)
TABLE = {
    "__main__": "cli",
    "__init__": "runner checkpoint graph",
    "inventory": "cli runner graph architecture errors types",
    "cli": "export runner selection scoring activations checkpoint graph architecture registry source errors types",  # noqa: E501
    "runner": "report problem checkpoint activations data architecture registry source errors types profiling",  # noqa: E501
    "report": "errors",
    "models": "checkpoint data graph architecture registry errors types",
    "calibs": "data registry errors types",
    "criteria": "scoring activations graph architecture registry errors types",
    "ratios": METHODS,
    "excludes": "registry errors types",
    "pruners": METHODS,
    "recoveries": METHODS,
    "evals": "export checkpoint activations data graph architecture registry errors types profiling",  # noqa: E501
    "problem": "selection activations graph architecture registry errors types",
    "solvers": "selection activations checkpoint data graph architecture errors types",
    "selection": "activations checkpoint graph architecture errors types",
    "scoring": "activations graph architecture errors types",
    "training": "data graph architecture errors types",
    "export": "checkpoint graph architecture errors types",
    "checkpoint": "graph architecture errors types",
    "activations": "graph architecture errors types",
    "data": "errors",
    "graph": "architecture errors types",
    "architecture": "errors types",
    "registry": "source errors",
    "source": "errors",
    "types": "",
    "errors": "",
    "profiling": "",
}
"""Package or module at prunekit's top -> what its files may import of prunekit, at their top or in
a function. Each stands above all that it may import.
"""
HEAVY = {"transformers", "peft", "datasets", "lm_eval", "wandb", "gguf", "accelerate", "torchao"}
FILES = sorted((ROOT / "prunekit").rglob("*.py"))


def package_of(path: Path) -> str:
    return path.relative_to(ROOT / "prunekit").with_suffix("").parts[0]


@cache
def imported(path: Path, at_top: bool = False) -> frozenset[str]:
    """Dotted names of the modules that a file imports, anywhere or at its top only."""
    tree = ast.parse(path.read_text())
    names: set[str] = set()
    for node in tree.body if at_top else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            folder = path.parents[node.level - 1].relative_to(ROOT).parts if node.level else ()
            module = ".".join([*folder, *filter(None, [node.module])])
            whole = module in ("prunekit", ".".join(folder))  # `from prunekit import graph`
            names |= {f"{module}.{a.name}" for a in node.names} if whole else {module}
    return frozenset(names)


def test_the_table_runs_downward_only():
    order = list(TABLE)
    for package, below in TABLE.items():
        for name in below.split():
            assert order.index(name) > order.index(package), f"{package} may not import {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_table(path):
    own = package_of(path)
    ours = [name for name in imported(path) if name.partition(".")[0] == "prunekit"]
    found = {name.split(".")[1] for name in ours if name != "prunekit"}
    assert own in TABLE, f"{own} is not in the table"
    assert found - {own} <= set(TABLE[own].split()), f"{own} may import {TABLE[own] or 'nothing'}"


def test_contributing_shows_the_table():
    """Its rows are the packages from the top to the bottom."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    shown = text.split("## How it is laid out")[1].split("|---|---|\n")[1].split("\n\n")[0]
    rows = [re.findall(r"`(\w+)`", row.split("|")[1]) for row in shown.splitlines()]
    assert [name for row in rows for name in row] == [n for n in TABLE if not n.startswith("__")]


def test_no_files_import_each_other_in_a_circle():
    """But for a package's `__init__`, which gathers what its files have."""
    files = [path for path in FILES if path.name != "__init__.py"]
    TopologicalSorter({path: imported_files(path) & set(files) for path in files}).prepare()


def test_a_component_is_imported_by_nobody():
    """What two of them share lies in a file that registers none, or further down."""
    registered = {
        entry.module for r in REGISTRIES.values() for entry in components(r.package).values()
    }
    assert len(registered) > 30
    for path in FILES:
        assert not imported(path) & registered, path


def test_components_wait_for_what_is_heavy():
    """Of a component that a command asks for, no more is loaded than its options need."""
    for registry in REGISTRIES.values():
        for path in sorted((ROOT / "prunekit" / registry.package).glob("*.py")):
            assert not {n.partition(".")[0] for n in imported(path, at_top=True)} & HEAVY, path


def test_wandb_has_one_door():
    doors = [p.name for p in FILES if {n.partition(".")[0] for n in imported(p)} & {"wandb"}]
    assert doors == ["tracking.py"]


def test_reports_read_what_is_on_disk_and_load_no_torch():
    for path in FILES:
        if package_of(path) == "report":
            found = {n.partition(".")[0] for n in imported(path)}
            assert not found & {"torch", "transformers"}, path


def test_the_inventory_checks_a_run_and_starts_none():
    for path in FILES:
        if package_of(path) == "inventory":
            runner = {n for n in imported(path) if n.startswith("prunekit.runner")}
            assert runner <= {"prunekit.runner", "prunekit.runner.preflight"}, path


def test_no_pickles():
    calls = ("torch.save(", "torch.load(", "pickle.load", "pickle.dump", "weights_only=False")
    for path in FILES:
        for call in calls:
            assert call not in path.read_text(), f"{path}: {call}"
