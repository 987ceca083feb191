"""What the jobs of a sweep are doing: each leaves a line in its folder, the sweep shows them while
they run in other processes.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from prunekit.runner.distributed import first_process

log = logging.getLogger("prunekit")
FILE = "stage.txt"


def note(folder: Path, text: str) -> None:
    """Leave `text` as what this job is doing; a folder that cannot be written stops nothing."""
    if not first_process():
        return
    aside = folder / f".{FILE}"
    try:
        aside.write_text(text, errors="backslashreplace")
        aside.replace(folder / FILE)
    except OSError as error:
        log.debug("%s: %s", folder / FILE, error)
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def current_stage(folder: Path) -> str:
    """What the job in `folder` last said; `waiting` where it said nothing yet."""
    try:
        return (folder / FILE).read_text()
    except FileNotFoundError:
        return "waiting"


@contextmanager
def show_progress(folders: Sequence[Path], every: float = 0.5) -> Iterator[None]:
    """Inside, a change in what a job is doing becomes one line of the log: `[3/12] Element1_seed=0:
    dense/wikitext2`.
    """
    for folder in folders:
        (folder / FILE).unlink(missing_ok=True)
    stop = threading.Event()

    def follow() -> None:
        seen: dict[Path, str] = {}
        done = False
        while not done:
            done = stop.wait(every)
            for i, folder in enumerate(folders, 1):
                now = current_stage(folder)
                if now != seen.get(folder, "waiting"):
                    seen[folder] = now
                    log.info("[%d/%d] %s: %s", i, len(folders), folder.name, now)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
