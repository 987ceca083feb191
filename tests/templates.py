"""The components that CONTRIBUTING.md and the README show, and copies of the repository to put them
into.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from paths import ROOT

from prunekit.registry import REGISTRIES

PLURALS = {kind: registry.package for kind, registry in REGISTRIES.items()}


def shown(page: str) -> dict[str, str]:
    """path in the repository -> text, of each block that names its file in the first line."""
    block = r"```(?:python|yaml)\n# (\S+\.(?:py|yaml))\n(.*?)```"
    return dict(re.findall(block, (ROOT / page).read_text(), flags=re.DOTALL))


TEMPLATES = shown("CONTRIBUTING.md")
EXAMPLE = shown("README.md")


def files_of(kind: str) -> dict[str, str]:
    """The Python file and the YAML of one kind of component."""
    tops = (f"prunekit/{PLURALS[kind]}/", f"conf/{kind}/")
    return {path: text for path, text in TEMPLATES.items() if path.startswith(tops)}


def copy_of_the_package(top: Path) -> Path:
    for name in ("prunekit", "conf", "hydra_plugins"):
        shutil.copytree(ROOT / name, top / name, ignore=shutil.ignore_patterns("__pycache__"))
    return top


def add(top: Path, files: dict[str, str]) -> None:
    for path, text in files.items():
        assert not (top / path).exists(), f"{path} is a template and a file"
        (top / path).write_text(text)


def environment(top: Path, **more: str) -> dict[str, str]:
    """In which the copy is the prunekit that is imported."""
    return os.environ | {"PYTHONPATH": str(top), "COLUMNS": "200", "HF_HUB_OFFLINE": "1"} | more
