"""Runs of several processes (torchrun, accelerate launch)."""

from __future__ import annotations

import os


def first_process() -> bool:
    """Under torchrun or accelerate launch every process runs the whole job, and only the first one
    writes what it found.
    """
    return int(os.environ.get("RANK", "0")) == 0
