"""One job of a sweep: runs it, shows its table, and keeps its failure from taking the other jobs along."""

from __future__ import annotations

import logging
import traceback
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from prunekit.registry import ConfigError
from prunekit.run import objective, run
from prunekit.table import show

log = logging.getLogger("prunekit")


def run_job(cfg: dict[str, Any], failures: list[str]) -> float | None:
    """The objective of one job. A failure is written to `failed.txt` in its folder and noted in `failures`."""
    folder = Path(cfg["out"])
    try:
        record = run(cfg, folder)
    except KeyboardInterrupt:
        raise
    except Exception as e:  # noqa: BLE001 (any failure of one job must leave the others running)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "failed.txt").write_text(traceback.format_exc())
        kind = "ConfigError: " if isinstance(e, ConfigError) else f"{type(e).__name__}: "
        failures.append(f"prunekit: {'job ' + str(folder) + ' failed: ' if sweeping() else ''}{kind}{e}")
        if not isinstance(e, ConfigError):
            log.error("%s", traceback.format_exc())
        return None
    show(record, folder)
    return objective(record, cfg["objective"])


def sweeping() -> bool:
    """Whether this job is one of a multirun."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
