"""Pages of the site that are not files of docs/.

README files of the studies, CONTRIBUTING.md and CHANGELOG.md lie where a reader of the repository
looks for them. Each module and package of prunekit has a page of the API, from its docstrings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The studies of LLM-Pruner and the packages are listed by what is there."""
    root = Path(config.config_file_path).parent
    benchmarks = section(config.nav, "Benchmarks")
    section(benchmarks, "LLM-Pruner's tables").extend(
        {path.parent.name: path.relative_to(root).as_posix()}
        for path in sorted((root / "experiments/llm_pruner").glob("*/README.md"), key=natural)
    )
    section(config.nav, "API").extend(
        {f"prunekit.{name}": f"api/{name}.md"} for name in packages(root)
    )
    return config


def section(nav: Any, title: str) -> list[Any]:
    """The list below `title`."""
    return next(entry[title] for entry in nav if isinstance(entry, dict) and title in entry)


def natural(path: Path) -> tuple[str, int]:
    """table2 before table10."""
    name = path.parent.name
    digits = name.removeprefix("table")
    return ("table", int(digits)) if digits.isdigit() else (name, 0)


def packages(root: Path) -> list[str]:
    """Names of prunekit's modules and packages, in order."""
    top = root / "prunekit"
    modules = {path.stem for path in top.glob("[a-z]*.py")}
    return sorted(modules | {path.parent.name for path in top.glob("*/__init__.py")})


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files that lie elsewhere, and the pages made for packages."""
    root = Path(config.config_file_path).parent
    elsewhere = [
        root / "CONTRIBUTING.md",
        root / "CHANGELOG.md",
        *sorted((root / "experiments").rglob("README.md")),
    ]
    for path in elsewhere:
        uri = path.relative_to(root).as_posix()
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    for name in packages(root):
        text = f"---\ntitle: prunekit.{name}\n---\n\n::: prunekit.{name}\n"
        files.append(File.generated(config, f"api/{name}.md", content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A link into docs/ from a file beside it: on the site they are neighbours."""
    return markdown.replace("](docs/", "](")
