"""Where a number comes from: versions, commit, seed, hardware, and a hash of the calibration
tokens.
"""

from __future__ import annotations

import hashlib
import os
import platform
import random
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunekit.architecture.hardware import processor
from prunekit.runner.resume import code_version

PACKAGES = (
    "prunekit",
    "torch",
    "transformers",
    "peft",
    "datasets",
    "lm_eval",
    "wandb",
    "hydra-core",
    "accelerate",
)


def seed_everything(seed: int) -> None:
    """Seeds Python, numpy and torch once; calibration draws from generators of its own."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers start from `seed` inside, and go on as before afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        seed_everything(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def collect(
    cfg: dict[str, Any], tokens: Tensor | None, files: Sequence[Any] = ()
) -> dict[str, Any]:
    """What a reader needs to judge or repeat the run; every value is plain JSON.

    files: the state of those that the configuration names, when the run began.
    """
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": cfg["seed"],
        "versions": {p: found for p in PACKAGES if (found := version_of(p))}
        | {"python": platform.python_version()},
        "code": code_version(cfg),
        "files": list(files),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "hardware": hardware(),
        "calibration": None
        if tokens is None
        else {"shape": list(tokens.shape), "sha256": token_hash(tokens)},
    }


def token_hash(tokens: Tensor) -> str:
    """SHA-256 of the tokens' int64 bytes, row by row."""
    return hashlib.sha256(tokens.cpu().contiguous().to(torch.int64).numpy().tobytes()).hexdigest()


def hardware() -> dict[str, Any]:
    """CPU, cores, threads, and the names of the GPUs."""
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpu_names(),
    }


def gpu_names() -> list[str]:
    """What each GPU calls itself; none without CUDA."""
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def version_of(package: str) -> str | None:
    """None where the package is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*args: str) -> str | None:
    """Output of git in the source tree; None where there is no git or no repository."""
    try:
        done = subprocess.run(
            ["git", *args],
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
