"""The package stays one that can be read: few files at its top, short files, short functions."""

from __future__ import annotations

import ast

import pytest
from paths import ROOT

FILES = [p for top in ("prunekit", "hydra_plugins") for p in sorted((ROOT / top).rglob("*.py"))]
AT_TOP, LINES, BODY = 8, 300, 50


def too_long(text: str) -> dict[str, int]:
    """Functions with more lines than there may be after their docstring, unless their `def` says
    why: `# long: reason`.
    """
    found = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            lines = node.end_lineno - body[0].lineno + 1 if body else 0
            reason = text.splitlines()[node.lineno - 1].partition("# long: ")[2].strip()
            if lines > BODY and not reason:
                found[node.name] = lines
    return found


def test_the_top_is_small():
    assert len(list((ROOT / "prunekit").glob("*.py"))) <= AT_TOP


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= LINES
    assert not too_long(text)


def test_what_counts_is_the_body_and_a_reason_excuses_it():
    lines = "\n".join(["    x = 1"] * (BODY + 1))
    assert too_long(f"def f():\n{lines}") == {"f": BODY + 1}
    assert too_long(f"def f():  # long: a table\n{lines}") == {}
    assert too_long(f"def f():  # long:\n{lines}") == {"f": BODY + 1}
    short = "\n".join(["    x = 1"] * BODY)
    doc = '    """' + "\n".join(["One."] * 60) + '"""'
    assert too_long(f"def f():\n{doc}\n{short}") == {}
