"""What the documentation says can be followed: links lead somewhere, commands compose."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
from paths import ROOT

from prunekit.cli.compose import composed
from prunekit.cli.main import COMMANDS, one_experiment_each
from prunekit.cli.suggestions import kinds, yaml_names
from prunekit.runner.preflight import build_components

PAGES = sorted(
    p.relative_to(ROOT).as_posix()
    for p in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("experiments/**/*.md")]
)
BESIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "experiments/")
"""Pages of the site that lie beside docs/; docs/hooks.py puts them in."""


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r'\]\(([^)\s]+)\)|src="([^"]+)"', (ROOT / page).read_text()):
        target = "".join(link).partition("#")[0]
        if not target or target.startswith(("http://", "https://")):
            continue
        found = (ROOT / page).parent / target
        if page.startswith("docs/"):
            on_site = target.removeprefix("../")
            found = ROOT / on_site if on_site.startswith(BESIDE) else found
            inside = found.resolve().is_relative_to(ROOT / "docs") or on_site.startswith(BESIDE)
            assert inside, f"{page}: {target} is no page of the site"
        assert found.exists(), f"{page}: {target}"


def commands(page: str) -> list[list[str]]:
    """Words of every `prunekit ...` that the page shows, whether in a line or in a block of its
    own.
    """
    text = (ROOT / page).read_text()
    shown = re.findall(r"(?<!`)`(prunekit [^`\n]+)`(?!`)", text)
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    shown += [line.strip() for line in lines if line.strip().startswith("prunekit ")]
    return [shlex.split(line, comments=True)[1:] for line in shown]


SHOWN = [words for page in PAGES if "/llm_pruner/" not in page for words in commands(page)]
"""Of LLM-Pruner's tables the configurations have tests of their own."""
RUNS = sorted(
    {tuple(w) for w in SHOWN if w[0] not in (*COMMANDS, "--cfg", "--help")}
    | {tuple(w[1:]) for w in SHOWN if w[0] == "plan" and "=" in "".join(w[1:2])}
)
EXAMPLE = "criterion=weight_spread"
"""Written by the reader; tests/test_templates.py writes it."""


@pytest.mark.parametrize("words", [w for w in RUNS if EXAMPLE not in w], ids=" ".join)
def test_every_command_composes_into_components(words, tmp_path, monkeypatch):
    (tmp_path / "my.jsonl").write_text('{"text": "some text"}\n')
    monkeypatch.chdir(tmp_path)
    for one in one_experiment_each(list(words)):
        build_components(next(composed(one)))


def test_commands_are_found_in_lines_and_in_blocks():
    assert len(RUNS) > 30
    assert ("criterion=weight_spread",) in RUNS
    assert ("experiment=demo",) in RUNS


def test_counts_of_architectures_are_those_of_the_table():
    table = (ROOT / "docs/coverage.md").read_text()
    right, all_there = re.findall(r"hidden all right \| (\d+) of (\d+) \|", table)[0]
    readme, index = (
        " ".join((ROOT / p).read_text().split()) for p in ("README.md", "docs/index.md")
    )
    assert f"Right on {right} of {all_there} decoder-only architectures" in readme
    assert f"{all_there} decoder-only architectures" in index


MADE_UP = "weight_spread tailor NAME"
"""Names that the documentation gives to what is not there."""


def test_components_that_pages_and_comments_name_are_there():
    named = rf"(?<![\w.{{/])({'|'.join(kinds())})=([A-Za-z]\w*(?:/\w+)?)"
    for path in [*map(ROOT.joinpath, PAGES), *(ROOT / "conf").rglob("*.yaml")]:
        if path.name != "CHANGELOG.md":
            for kind, name in re.findall(named, path.read_text()):
                there = name in yaml_names(kind) or name.rpartition("/")[2] in MADE_UP.split()
                assert there or name == "peers", f"{path}: {kind}={name}"


def documented(path: Path) -> list[tuple[str, set[str], set[str]]]:
    """Each function of the file with an `Args:` section: its name, what the section names, and its
    parameters.
    """
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            section = re.search(r"^Args:\n((?:    .*\n?|\n)+)", ast.get_docstring(node) or "", re.M)
            if section:
                named = set(re.findall(r"^    (\S.*?):(?: |$)", section[1], re.M))
                a = node.args
                parameters = {p.arg for p in (*a.posonlyargs, *a.args, *a.kwonlyargs)}
                found.append((f"{path.name}: {node.name}", named, parameters))
    return found


def test_docstrings_name_the_parameters_that_there_are():
    """One a line, or the API reference cannot be built."""
    found = [f for p in sorted((ROOT / "prunekit").rglob("*.py")) for f in documented(p)]
    assert len(found) > 3
    for where, named, parameters in found:
        assert named <= parameters, where
