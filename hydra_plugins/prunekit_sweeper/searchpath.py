"""The YAMLs of PRUNEKIT_COMPONENTS beside prunekit's own."""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from prunekit.cli.paths import conf_dirs


class OwnFolder(SearchPathPlugin):
    """Hydra looks into the user's folder after prunekit's."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in conf_dirs()[1:]:
            search_path.append("PRUNEKIT_COMPONENTS", f"file://{folder}")
