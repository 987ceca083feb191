"""One job of a sweep: runs it, shows its table, and keeps its failure from taking the other jobs
along.
"""

from __future__ import annotations

import logging
import traceback
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from prunekit.errors import ConfigError
from prunekit.runner import progress
from prunekit.runner.distributed import first_process
from prunekit.runner.run import objective, run
from prunekit.runner.summary import show

log = logging.getLogger("prunekit")


def run_job(cfg: dict[str, Any], failures: list[str]) -> float | None:
    """The objective of one job. A failure is written to `failed.txt` in its folder and noted in
    `failures`.
    """
    folder = Path(cfg["out"])
    which = f"job {folder} failed: " if sweeping() else ""
    (folder / "failed.txt").unlink(missing_ok=True)
    try:
        record = run(named(cfg, folder) if sweeping() else cfg, folder)
    except KeyboardInterrupt:
        raise
    except Exception as e:  # noqa: BLE001 (any failure of one job must leave the others running)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "failed.txt").write_text(traceback.format_exc())
        kind = "ConfigError: " if isinstance(e, ConfigError) else f"{type(e).__name__}: "
        progress.note(folder, f"failed: {kind}{e}")
        failures.append(f"prunekit: {which}{kind}{e}")
        if not isinstance(e, ConfigError):
            log.error("%s", traceback.format_exc())
        return None
    if first_process():
        show(record, folder)
    try:
        return objective(record, cfg["objective"])
    except ConfigError as e:  # the result is whole all the same
        failures.append(f"prunekit: {which}ConfigError: {e}")
        return None


def named(cfg: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The tracker shows the jobs of a sweep together, each under the name of its folder, unless the
    user names them otherwise.
    """
    own = {"group": cfg.get("table") or folder.parent.name, "name": folder.name}
    return cfg | {
        "track": cfg["track"] | {k: v for k, v in own.items() if cfg["track"].get(k) is None}
    }


def sweeping() -> bool:
    """Whether this job is one of a multirun."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
