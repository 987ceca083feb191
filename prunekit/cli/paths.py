"""Where the YAMLs are, and which package holds the components of which kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prunekit.errors import ConfigError
from prunekit.source import tops

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


def conf_dirs() -> list[Path]:
    """The YAML folder, and that of the user's own components where there is one. Raises ConfigError
    for a YAML that is in both.
    """
    ours, own = conf_dir(), [top / "conf" for top in tops()[1:]]
    names = [p.relative_to(folder) for folder in own for p in sorted(folder.rglob("*.yaml"))]
    taken = [name for name in names if (ours / name).is_file()]
    if taken:
        raise ConfigError(f"{own[0] / taken[0]}: prunekit has that YAML; call yours otherwise")
    return [ours, *[folder for folder in own if folder.is_dir()]]


def composing() -> Any:
    """Hydra's context in which the YAMLs of `conf_dirs` are composed."""
    from hydra import initialize_config_dir
    from hydra.core.plugins import Plugins

    from hydra_plugins.prunekit_sweeper.searchpath import OwnFolder

    # Hydra finds it by itself but for editable installs, whose namespace it cannot list.
    Plugins.instance().register(OwnFolder)
    return initialize_config_dir(str(conf_dir()), version_base="1.3")
