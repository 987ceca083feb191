"""Puts what code reads at run time, but lies beside the package in a checkout, inside of it in a
wheel. The rest is in pyproject.toml.
"""

from __future__ import annotations

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
CARRIED = {"conf": "**/*.yaml", "experiments": "**/paper.json"}
"""folder of the checkout, and of the package -> the files of it that are read."""


def carried() -> list[Path]:
    """Relative to the checkout, in order."""
    return sorted(
        p.relative_to(ROOT) for top, pattern in CARRIED.items() for p in (ROOT / top).glob(pattern)
    )


class Build(build_py):
    """Editable installs read the checkout, where nothing has to be copied."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for path in carried():
                target = Path(self.build_lib) / "prunekit" / path
                self.mkpath(str(target.parent))
                self.copy_file(str(ROOT / path), str(target))


if __name__ == "__main__":
    setup(cmdclass={"build_py": Build})
