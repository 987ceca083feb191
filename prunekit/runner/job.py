"""One job of a sweep: runs it, shows its table, and keeps its failure from taking the other jobs
along.
"""

from __future__ import annotations

import json
import logging
import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from prunekit.errors import ConfigError, NotFinite, cannot_write
from prunekit.runner import parent, progress, resume, store
from prunekit.runner.distributed import first_process, several
from prunekit.runner.run import objective, run
from prunekit.runner.summary import show

log = logging.getLogger("prunekit")
LEFTOVERS = (".*.part*", ".*.old*", "*.tmp")
"""What a process leaves that is killed while it writes a checkpoint, an entry or a result."""
AT_FIRST = (".hydra", "run.log", ".running")
"""What Hydra and the lock put into a job's folder before the job begins."""


def run_job(cfg: dict[str, Any], failures: list[str]) -> float | None:
    """The objective of one job. A failure is written to `failed.txt` in its folder and noted in
    `failures`; a single run whose config is refused before it begins leaves an empty folder. Two
    processes with the same job: one runs it, the other waits, and takes the result where it is one
    of a sweep.
    """
    parent.follow()
    folder = Path(cfg["out"])
    which = f"job {folder} failed: " if sweeping() else ""
    cfg = named(cfg, folder) if sweeping() else cfg
    try:
        with alone(folder):
            if made_meanwhile(folder, cfg):
                log.info("%s was finished by another process", folder)
                return objective(json.loads((folder / "result.json").read_text()), cfg["objective"])
            warn_of_earlier(folder, cfg)
            (folder / "failed.txt").unlink(missing_ok=True)
            record = run(cfg, folder, "" if sweeping() else f"hydra.run.dir={folder}")
    except KeyboardInterrupt:
        raise
    except Exception as e:  # noqa: BLE001 (any failure of one job must leave the others running)
        failures.append(f"prunekit: {which}{described(e, folder)}")
        if isinstance(e, ConfigError) and not sweeping() and not_begun(folder):
            for name in AT_FIRST:  # by which reports would list it
                store.discard(folder / name)
        else:
            note_failure(folder, e)
        return None
    if first_process():
        show(record, folder)
    try:
        return objective(record, cfg["objective"])
    except ConfigError as e:  # the result is whole all the same
        failures.append(f"prunekit: {which}ConfigError: {e}")
        return None


def made_meanwhile(folder: Path, cfg: dict[str, Any]) -> bool:
    """Whether another process made this job of a sweep since the sweep looked; where several
    processes share a job, the others have begun.
    """
    return sweeping() and not several() and resume.looked_at(folder, cfg)[0]


def warn_of_earlier(folder: Path, cfg: dict[str, Any]) -> None:
    """Says what of an earlier run in this folder will be replaced, or stays beside another result;
    a sweep has said which of its results are replaced.
    """
    if not sweeping() and (folder / "result.json").exists():
        log.warning("%s holds a result, which this run replaces at its end", folder)
    if not cfg["save"] and (folder / "checkpoint").exists():
        log.warning("%s is an earlier run's, this one saves none", folder / "checkpoint")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Only one process at a time runs the job of a folder, the others wait for it. The processes of
    torchrun share a job, and its first one holds the lock.
    """
    from filelock import FileLock, Timeout

    if not first_process():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".running")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("%s is being run by another process: waiting for it", folder)
        lock.acquire()
    try:
        tidy(folder)
        yield
    finally:
        lock.release()


def tidy(folder: Path) -> None:
    """Removes what a killed process left half-written; nobody else writes here now."""
    for place in (folder, *folder.glob("stages/*")):
        for path in [p for pattern in LEFTOVERS for p in place.glob(pattern)]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def not_begun(folder: Path) -> bool:
    """Whether a job's folder has only what is there before the job begins."""
    return folder.is_dir() and {p.name for p in folder.iterdir()} <= set(AT_FIRST)


def described(error: Exception, folder: Path) -> str:
    """`ConfigError: ...`; of a disk that is full or cannot be written, which file it was."""
    kind = "ConfigError" if isinstance(error, ConfigError) else type(error).__name__
    return cannot_write(error, folder) or f"{kind}: {error}"


def note_failure(folder: Path, error: Exception) -> None:
    """`failed.txt` and the stage, as far as they can be written; a traceback for what nobody
    expected.
    """
    words, disk = described(error, folder), cannot_write(error)
    if not disk and not isinstance(error, ConfigError | NotFinite):
        log.error("%s", traceback.format_exc())
    file, aside = folder / "failed.txt", folder / "failed.txt.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = f"{words}\n" if disk else traceback.format_exc()
        aside.write_text(text, errors="backslashreplace")
        aside.replace(file)
    except OSError as second:
        log.error("%s: %s", words, cannot_write(second, folder) or second)
        with suppress(OSError):
            aside.unlink(missing_ok=True)
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
