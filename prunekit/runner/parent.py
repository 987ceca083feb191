"""Workers of a sweep end when the process that started them is gone, however it ended."""

from __future__ import annotations

import os
import platform
import signal
import threading
import time

import psutil

VARIABLE = "PRUNEKIT_SWEEP"
EVERY = 0.5
"""Seconds between looks."""
GRACE = 1.0
"""Seconds that a worker has to end by SIGTERM."""


def announce() -> None:
    """Tells the processes started from here on whom they belong to."""
    own = psutil.Process()
    os.environ[VARIABLE] = f"{platform.node()}:{own.pid}:{own.create_time()}"


def follow() -> None:
    """In a worker on the same machine: ends this process soon after the announced one. Jobs of a
    cluster outlive the command that submitted them.
    """
    node, _, rest = os.environ.get(VARIABLE, "").partition(":")
    pid, _, born = rest.partition(":")
    if node != platform.node() or int(pid) == os.getpid() or "SLURM_JOB_ID" in os.environ:
        return
    if any(thread.name == VARIABLE for thread in threading.enumerate()):
        return
    watch = threading.Thread(target=_watch, args=(int(pid), float(born)), name=VARIABLE)
    watch.daemon = True
    watch.start()


def _watch(pid: int, born: float) -> None:
    while alive(pid, born):
        time.sleep(EVERY)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(1)  # in the middle of a long call into a library


def alive(pid: int, born: float) -> bool:
    """Whether that very process still runs."""
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - born) < 1
        return bool(same and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
