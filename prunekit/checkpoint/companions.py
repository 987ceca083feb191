"""The JSON files beside config.json: of what is in them, transformers takes anything without a
word.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prunekit.checkpoint.integrity import CheckpointError, read_json

FLAGS = ("use_cache", "do_sample")
"""Of generation, beside those that begin with `output_`."""


def check_companions(folder: Path, files: Iterable[str]) -> None:
    """Raises CheckpointError for a listed JSON file that holds no object, a generation config whose
    flags or token ids are none, and a tokenizer of no class.
    """
    listed = set(files)
    # A tokenizer.json is large, and read as a whole where the tokenizer is.
    names = sorted(n for n in listed if n.endswith(".json") and n != "tokenizer.json")
    contents = {name: read_json(folder / name) for name in names}
    for key, value in contents.get("generation_config.json", {}).items():
        if not _generation_value(key, value):
            raise CheckpointError(f"{folder / 'generation_config.json'}: {key} is {value!r:.80}")
    tokenizer = contents.get("tokenizer_config.json")
    file = folder / "tokenizer_config.json"
    if tokenizer is None:
        if "tokenizer.json" in listed:
            raise CheckpointError(f"{file} is not among the files of pruning.json")
        return
    for key, usual in (("tokenizer_class", None), ("backend", "")):
        value = tokenizer.get(key, usual)
        if not isinstance(value, str):
            raise CheckpointError(f"{file}: {key} is {value!r:.80}, not a name")


def _generation_value(key: str, value: Any) -> bool:
    """Whether a field of a generation config can be meant."""
    if value is None:
        return True
    if key in FLAGS or key.startswith("output_"):
        return isinstance(value, bool)
    if key.endswith("_token_id"):
        ids = value if isinstance(value, list) else [value]
        return all(type(i) is int and i >= -1 for i in ids)
    return True
