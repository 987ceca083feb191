"""One job of a sweep: runs it, shows its table, and keeps its failure from taking the other jobs
along.
"""

from __future__ import annotations

import errno
import json
import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from prunekit.errors import ConfigError, NotFinite
from prunekit.runner import parent, progress, resume
from prunekit.runner.distributed import first_process
from prunekit.runner.run import objective, run
from prunekit.runner.summary import show

log = logging.getLogger("prunekit")
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
"""What the operating system says of a disk that is full, or of a folder that cannot be written."""


def run_job(cfg: dict[str, Any], failures: list[str]) -> float | None:
    """The objective of one job. A failure is written to `failed.txt` in its folder and noted in
    `failures`. Two processes with the same job: one runs it, the other waits, and takes the result
    where it is one of a sweep.
    """
    parent.follow()
    folder = Path(cfg["out"])
    which = f"job {folder} failed: " if sweeping() else ""
    cfg = named(cfg, folder) if sweeping() else cfg
    try:
        with alone(folder) as waited:
            if waited and sweeping() and resume.finished(folder, cfg):
                log.info("%s was finished by another process", folder)
                return objective(json.loads((folder / "result.json").read_text()), cfg["objective"])
            (folder / "failed.txt").unlink(missing_ok=True)
            record = run(cfg, folder)
    except KeyboardInterrupt:
        raise
    except Exception as e:  # noqa: BLE001 (any failure of one job must leave the others running)
        failures.append(f"prunekit: {which}{described(e)}")
        note_failure(folder, e)
        return None
    if first_process():
        show(record, folder)
    try:
        return objective(record, cfg["objective"])
    except ConfigError as e:  # the result is whole all the same
        failures.append(f"prunekit: {which}ConfigError: {e}")
        return None


@contextmanager
def alone(folder: Path) -> Iterator[bool]:
    """Only one process at a time runs the job of a folder: whether it had to wait for another one.
    The processes of torchrun share a job, and its first one holds the lock.
    """
    from filelock import FileLock, Timeout

    if not first_process():
        yield False
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".running")
    waited = False
    try:
        lock.acquire(timeout=0)
    except Timeout:
        waited = True
        log.info("%s is being run by another process: waiting for it", folder)
        lock.acquire()
    try:
        yield waited
    finally:
        lock.release()


def described(error: Exception) -> str:
    """`ConfigError: ...`; of a disk that is full or cannot be written, which file it was."""
    if isinstance(error, OSError) and error.errno in DISK:
        return f"{error.filename or 'a file'} cannot be written: {error.strerror}"
    kind = "ConfigError" if isinstance(error, ConfigError) else type(error).__name__
    return f"{kind}: {error}"


def note_failure(folder: Path, error: Exception) -> None:
    """`failed.txt` and the stage, as far as they can be written; a traceback for what nobody
    expected.
    """
    words = described(error)
    disk = isinstance(error, OSError) and error.errno in DISK
    expected = disk or isinstance(error, ConfigError | NotFinite)
    if not expected:
        log.error("%s", traceback.format_exc())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = traceback.format_exc() if not isinstance(error, OSError) else f"{words}\n"
        (folder / "failed.txt").write_text(text, errors="backslashreplace")
    except OSError as second:
        log.error("%s cannot be written: %s", folder / "failed.txt", second.strerror)
    progress.note(folder, f"failed: {words}")


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
