"""`deterministic=true`: the same run gives the same bits on a GPU each time."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from prunekit.errors import ConfigError

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACES = (":4096:8", ":16:8")
"""Values of it with which cuBLAS sums in the same order each time."""


@contextmanager
def repeatable(cfg: dict[str, Any]) -> Iterator[None]:
    """Where `cfg` asks for it, torch takes the deterministic form of every operation inside; what
    was set before is set again afterwards.

    An operation without such a form raises ConfigError with its name, as does a process in which
    CUDA has begun with other settings.
    """
    if not cfg.get("deterministic"):
        yield
        return
    check_workspace()
    workspace = os.environ.get(CUBLAS)
    strict, warn = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    tuned = torch.backends.cudnn.benchmark
    os.environ[CUBLAS] = workspace or WORKSPACES[0]
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False  # it takes whichever algorithm was faster just now
    try:
        yield
    except RuntimeError as error:
        found = re.match(r"(.+?) does not have a deterministic implementation", str(error))
        if found is None:
            raise
        raise ConfigError(
            f"deterministic=true: {found[1]} has no form that gives the same bits each time: give "
            "deterministic=false, or run on the CPU"
        ) from error
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warn)
        torch.backends.cudnn.benchmark = tuned
        if workspace is None:
            os.environ.pop(CUBLAS, None)


def check_workspace() -> None:
    """Raises ConfigError where cuBLAS is told, or has begun, to sum in an order of its own."""
    given = os.environ.get(CUBLAS)
    if given not in (None, *WORKSPACES):
        raise ConfigError(
            f"deterministic=true with {CUBLAS}={given}; possible: {', '.join(WORKSPACES)}"
        )
    if given is None and torch.cuda.is_initialized():
        raise ConfigError(
            f"deterministic=true after CUDA has begun without it: give {CUBLAS}={WORKSPACES[0]} in "
            "the environment of the command"
        )
