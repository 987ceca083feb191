"""Where the YAMLs are, and which package holds the components of which kind."""

from __future__ import annotations

from pathlib import Path

PACKAGES = {
    "model": "models",
    "calib": "calibs",
    "criterion": "criteria",
    "ratio": "ratios",
    "exclude": "excludes",
    "pruner": "pruners",
    "recovery": "recoveries",
    "eval": "evals",
}
"""kind of component, which is a key of a configuration -> package."""


def conf_dir() -> Path:
    """The YAML folder: inside the package when installed from a wheel, beside it in a checkout."""
    package = Path(__file__).parent.parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"
