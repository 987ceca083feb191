"""Text files of the user's own, and the folder of local data."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator

from prunekit.errors import ConfigError


def existing_file(path: str) -> str:
    """`path`, if it names a file. Raises ConfigError."""
    if not Path(path).expanduser().is_file():
        raise ConfigError(
            f"{path} is not a file; a .jsonl file with one record a line, or plain text, is needed"
        )
    return path


def read(path: str | Path) -> list[dict[str, Any]]:
    """Records of a .jsonl file, or the lines of any other file under the key `text` (line ends
    kept). Raises ConfigError.
    """
    path = Path(existing_file(str(path))).expanduser()
    with path.open(encoding="utf-8") as lines:
        if path.suffix != ".jsonl":
            return [{"text": line} for line in lines]
        try:
            return [json.loads(line) for line in lines if line.strip()]
        except json.JSONDecodeError as e:
            raise ConfigError(f"{path} holds a line that is not JSON: {e}") from e


def data_folder(data_root: str | None) -> Path | None:
    """The folder of local data: the option, else `PRUNEKIT_DATA`, else none. Raises ConfigError if
    it is named and missing.
    """
    named = data_root or os.environ.get("PRUNEKIT_DATA")
    if not named:
        return None
    if not Path(named).expanduser().is_dir():
        raise ConfigError(
            f"data_root={named!r} is not a folder (option data_root or environment variable "
            "PRUNEKIT_DATA)"
        )
    return Path(named).expanduser()


def _folder(data_root: str | None) -> str | None:
    data_folder(data_root)
    return data_root


TextFile = Annotated[str, AfterValidator(existing_file)]
"""Type of an option that names a text or jsonl file; a missing one is found before a weight is
read.
"""
DataRoot = Annotated[str | None, AfterValidator(_folder)]
"""Type of the option `data_root`."""
