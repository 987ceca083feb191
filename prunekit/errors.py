"""Errors that a user can mend, and what the operating system says of a disk."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

DISK = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
)
"""A disk that is full, a file that may not grow, a folder that cannot be written."""


class ConfigError(ValueError):
    """Something the user asked for cannot be.

    The message says what was given and what is possible.
    """


class NotFinite(ArithmeticError):
    """NaN or infinity where there must be a number. The message names the stage and the layer."""


class NeedsData(ConfigError):
    """An answer that hangs on weights or text was asked for where only shapes are known."""


def expanded(path: str | Path) -> Path:
    """`path` with its `~` replaced. Raises ConfigError where there is no such home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(f"{path}: there is no such home folder on this machine") from None


def in_short(error: Exception, most: int | None = None) -> str:
    """The kind of an error and the first line of its message, at most so many characters of it;
    many have none.
    """
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first[:most]}"


def cannot_write(error: BaseException, folder: str | Path = "") -> str | None:
    """In words, which file the operating system did not write and why; None for other errors.

    Libraries in Rust (safetensors, tokenizers) raise errors of their own, which end in
    `(os error 28)` and name no file: `folder` stands for it then.
    """
    found = re.search(r"\(os error (\d+)\)", str(error))
    code = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
    if code not in DISK:
        return None
    name = getattr(error, "filename", None) or (f"a file below {folder}" if folder else "a file")
    return f"{name} cannot be written: {os.strerror(code)}"
