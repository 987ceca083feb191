"""What a stretch of work costs: its wall-clock seconds and the peak memory that the process held
during it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import psutil
import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
MIB = 2**20


def rss_mib() -> float:
    """Resident memory of this process now, MiB."""
    return float(psutil.Process().memory_info().rss / MIB)


def _high_water_mib() -> float:
    line = next(row for row in _STATUS.read_text().splitlines() if row.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def _reset_high_water() -> bool:
    """Start the kernel's count of the highest resident memory anew; False where the kernel has no
    such switch.
    """
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


class Peak:
    """Highest memory in use while the `with` is open: `.mib` afterwards, and `.start_mib` at its
    beginning.

    CUDA tensors count where CUDA has been used by then (the allocator's peak, summed over devices;
    `cuda` decides for certain), otherwise the resident memory of the process: exactly, through
    Linux's VmHWM, or sampled every 10 ms where that cannot be reset. Both counters are the
    process's own and there is one of each, so peaks that are open at once are told of every reset.
    Resident memory includes what the allocator keeps for reuse: a stage that reuses it shows a
    smaller peak than it would alone.
    """

    _open: ClassVar[list[Peak]] = []

    def __init__(self, cuda: bool | None = None) -> None:
        self.mib = self.start_mib = 0.0
        self._ask_cuda = _cuda_in_use if cuda is None else lambda: cuda
        self._exact, self._stop = False, threading.Event()
        self._sampler: threading.Thread | None = None

    def __enter__(self) -> Peak:
        for outer in Peak._open:
            outer._fold()
        self._cuda = self._ask_cuda()
        for device in range(torch.cuda.device_count() if _cuda_in_use() else 0):
            torch.cuda.reset_peak_memory_stats(device)
        self._exact = _reset_high_water()
        self.start_mib = _cuda_mib(torch.cuda.memory_allocated) if self._cuda else rss_mib()
        self.mib = self.start_mib
        Peak._open.append(self)
        if not self._exact:
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._sampler is not None:
            self._sampler.join()
        self._fold()
        Peak._open.remove(self)

    def _fold(self) -> None:
        if self._ask_cuda():
            # A stage that is the first to use CUDA starts on the host's memory and ends on the
            # device's, which is what counts there.
            self.mib = max(
                self.mib if self._cuda else 0.0, _cuda_mib(torch.cuda.max_memory_allocated)
            )
            self._cuda = True
        else:
            self.mib = max(self.mib, _high_water_mib() if self._exact else rss_mib())

    def _sample(self) -> None:
        while not self._stop.wait(0.01):
            if not self._cuda:
                self.mib = max(self.mib, rss_mib())


def _cuda_in_use() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def _cuda_mib(of_device: Callable[[int], int]) -> float:
    return sum(of_device(device) for device in range(torch.cuda.device_count())) / MIB


class Stages:
    """Seconds and peak memory of named stages: `with stages("prune"): ...`, then `stages.results`.

    A name used twice adds its seconds and keeps the higher peak. A stage that raises is recorded
    too.
    """

    def __init__(self) -> None:
        self.results: dict[str, dict[str, float]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start, peak = time.perf_counter(), Peak()
        try:
            with peak:
                yield
        finally:
            before = self.results.get(name, {"seconds": 0.0, "peak_memory_mib": 0.0})
            self.results[name] = {
                "seconds": before["seconds"] + time.perf_counter() - start,
                "peak_memory_mib": max(before["peak_memory_mib"], peak.mib),
            }
