"""Who may import whom: leaves know the core and never each other, wandb has one door, heavy
libraries wait until they are needed.
"""

from __future__ import annotations

import ast

import pytest
from paths import ROOT

LEAVES = ("models", "calibs", "criteria", "ratios", "excludes", "pruners", "recoveries", "evals")
RUNNER = {
    "prunekit.runner.run",
    "prunekit.runner.job",
    "prunekit.cli.main",
    "prunekit.runner.preflight",
    "prunekit.runner.results",
    "prunekit.runner.tracking",
    "prunekit.report",
}
HEAVY = ("transformers", "peft", "datasets", "lm_eval", "wandb", "gguf", "accelerate")
FILES = sorted((ROOT / "prunekit").rglob("*.py"))


def imported(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return names


def at_top(tree: ast.Module) -> set[str]:
    return imported(
        ast.Module([n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))], [])
    )


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_table(path):
    tree = ast.parse(path.read_text())
    package = path.relative_to(ROOT / "prunekit").parts[0]
    names = imported(tree)
    if path.name != "track.py":
        assert not any(n == "wandb" or n.startswith("wandb.") for n in names)
    if package in LEAVES and path.name != "__init__.py":
        for other in LEAVES:
            own = f"prunekit.{package}.__init__"
            siblings = [
                n
                for n in names
                if n.startswith(f"prunekit.{other}.")
                and ROOT.joinpath(*n.split(".")).with_suffix(".py").is_file()
            ]
            assert not siblings, (
                f"a leaf imports a leaf: {siblings} ({own} may hold what both share)"
            )
        assert not names & RUNNER
        heavy = [n for n in at_top(tree) if n.split(".")[0] in HEAVY]
        assert not heavy, f"imported at start-up by every command: {heavy}"
    if package == "inventory":
        assert not names & (RUNNER - {"prunekit.runner.preflight"} | {"prunekit.checkpoint"}), (
            "looks at a model's shapes; it runs and loads nothing"
        )
    if package in ("report",):
        assert not [n for n in names if n.split(".")[0] in ("torch", "transformers")], (
            "reports read results on disk only"
        )


def test_no_pickles():
    for path in FILES:
        text = path.read_text()
        for call in (
            "torch.save(",
            "torch.load(",
            "pickle.load",
            "pickle.dump",
            "weights_only=False",
        ):
            assert call not in text, f"{path}: {call}"
