"""The tutorial's code runs, in its order, and prints what stands below it; PRUNEKIT_REWRITE=1
writes down what it prints now.
"""

from __future__ import annotations

import os
import re
import shlex
from contextlib import redirect_stdout
from io import StringIO

import pytest
from paths import ROOT

from prunekit.cli.main import main as cli

PAGE = ROOT / "docs" / "tutorial.md"
BLOCK = re.compile(r"```(python|sh)\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", re.DOTALL)
VARIES = re.compile(r"\d+\.\d+")
"""Numbers that a processor's rounding or its speed may change: anything with decimals."""


def test_the_tutorial_runs_and_prints_what_it_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "tutorial"}
    page = PAGE.read_text()
    blocks = list(BLOCK.finditer(page))
    assert len(blocks) > 10
    parts, end = [], 0
    for block in blocks:
        language, code, shown = block.groups()
        printed = run_python(code, names) if language == "python" else run_shell(code)
        if "PRUNEKIT_REWRITE" in os.environ:
            parts += [
                page[end : block.start()],
                f"```{language}\n{code}```\n",
                f"\n```text\n{printed}```\n" if printed else "",
            ]
            end = block.end()
        else:
            compare(printed, shown or "", code)
    if "PRUNEKIT_REWRITE" in os.environ:
        PAGE.write_text("".join([*parts, page[end:]]))
        (ROOT / "docs" / "wren.svg").write_text((tmp_path / "wren.svg").read_text())
    assert (tmp_path / "wren.svg").read_text() == (ROOT / "docs" / "wren.svg").read_text()


def run_python(code: str, names: dict[str, object]) -> str:
    out = StringIO()
    with redirect_stdout(out):
        exec(compile(code, "<tutorial>", "exec"), names)
    return tidy(out.getvalue())


def run_shell(code: str) -> str:
    """`prunekit ...` lines, in this process."""
    out = StringIO()
    with redirect_stdout(out):
        for line in code.strip().splitlines():
            command, *words = shlex.split(line)
            assert command == "prunekit"
            assert cli(words) == 0
    return tidy(out.getvalue())


def tidy(text: str) -> str:
    """Without spaces at the ends of lines, and with a home that is nobody's."""
    lines = [line.rstrip().replace(os.getcwd(), "/path/to") for line in text.splitlines()]
    return "\n".join(lines).strip("\n") + "\n" if any(lines) else ""


def compare(printed: str, shown: str, code: str) -> None:
    """Word for word, but for numbers with decimals, which may be a little off."""
    assert VARIES.sub("#", printed) == VARIES.sub("#", shown), (
        f"the tutorial shows something else below:\n{code}"
    )
    for now, then in zip(VARIES.findall(printed), VARIES.findall(shown)):
        assert float(now) == pytest.approx(float(then), rel=0.15, abs=0.15)


def test_the_code_does_not_name_the_tutorials_models():
    for path in [*(ROOT / "prunekit").rglob("*.py"), *(ROOT / "conf").rglob("*.yaml")]:
        assert not re.search("persimmon|wren", path.read_text(), re.IGNORECASE), path
