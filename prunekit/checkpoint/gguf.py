"""Write a checkpoint that stock transformers loads as one GGUF file, tokenizer included; what the
format cannot hold is refused.

Nothing is taken on trust: the metadata is read back by transformers' own GGUF reader, and the
config and the tokens that come of it are compared with the model's before the tensors are written.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from prunekit.checkpoint.class_sizes import edited
from prunekit.checkpoint.construction import clean_config
from prunekit.checkpoint.gguf_file import Type, write_file
from prunekit.checkpoint.layout import difference
from prunekit.checkpoint.stock_config import mirrored
from prunekit.errors import ConfigError

log = logging.getLogger("prunekit")
FAMILIES = ("llama", "qwen2", "qwen3")
"""Architectures whose tensor names and metadata in GGUF are the Llama family's. Mistral is not
among them: transformers cannot read it.
"""
SPLITS = ("gpt-2", "llama-bpe", "qwen2", "tekken", "gpt-4o")
"""Names that GGUF has for how a byte-level tokenizer cuts text before merging."""
PROBE = (
    "The quick brown fox, 12345 + 3.14 = don't  DON'T\n\n\tfür über 東京 Привет 😀 <|endoftext|> "
    "x_y=f(z)[0]; https://a.b/c?d=e  "
)


def export_gguf(path: str | Path, out: str | Path, *, type: Type = "f16") -> Path:
    """Write the checkpoint folder `path` as the GGUF file `out`, which appears only when it is
    complete.

    f32 is exact for float32 weights, f16 and q8_0 round (q8_0: 8 bits and a scale per 32; rows that
    are no multiple of 32 stay f16). Raises ConfigError with the reason for a model or tokenizer
    that the format, as transformers reads it, cannot hold.
    """
    from prunekit.checkpoint import load

    model, tokenizer = load(path)
    return write_gguf(model, tokenizer, out, type=type)


def write_gguf(model: Any, tokenizer: Any, out: str | Path, *, type: Type = "f16") -> Path:
    """`export_gguf` for a model in memory; without tokenizer the file holds none."""
    out = Path(out)
    if type not in ("f32", "f16", "q8_0"):
        raise ConfigError(f"type={type!r}; possible: f32, f16, q8_0")
    family = _family(model)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as aside:
        trial = Path(aside) / "trial.gguf"
        split = _find_split(model, tokenizer, family, trial)
        write_file(trial, model, tokenizer, family, split, None)
        _check_config(model, trial)
        whole = Path(aside) / "whole.gguf"
        write_file(whole, model, tokenizer, family, split, type)
        with whole.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(whole, out)
    return out


def _family(model: Any) -> str:
    from prunekit.checkpoint.remote_code.runtime_modules import LAYOUT

    kind: str = model.config.model_type
    if LAYOUT in vars(model.config):
        what = ", ".join(sorted(getattr(model.config, LAYOUT)))
        reason = (
            f"GGUF has one width for all layers, and this {kind} differs by layer or from "
            f"what its class builds ({what})"
        )
        raise ConfigError(f"{reason}. Possible: prune with ratio.loadable=stock")
    if kind not in FAMILIES:
        raise ConfigError(f"GGUF export knows the Llama family ({', '.join(FAMILIES)}), not {kind}")
    return kind


def _check_config(model: Any, trial: Path) -> None:
    """Raises ConfigError naming what the config that transformers reads from the file would build
    differently.
    """
    from transformers import AutoConfig

    read = AutoConfig.from_pretrained(trial.parent, gguf_file=trial.name)
    mine = clean_config(model.config)
    if read.model_type != mine.model_type:
        raise ConfigError(f"GGUF reads as {read.model_type}, the model is {mine.model_type}")
    floats = {
        k: v
        for k, v in vars(mine).items()
        if isinstance(v, float) and isinstance(getattr(read, k, None), float)
    }
    # GGUF holds float32.
    rounded = {k: v for k, v in floats.items() if np.float32(v) == np.float32(getattr(read, k))}
    # The trial has no tensors, from which a reader could see that two are tied.
    read = edited(read, tie_word_embeddings=mine.tie_word_embeddings, **rounded)
    if read is None:
        raise ConfigError(f"GGUF reads as a {mine.model_type} whose sizes its config class refuses")
    read._attn_implementation = mine._attn_implementation
    left = difference(model, read, mirrored(model, read), own_configs=False)
    if left:
        missing = [f"{field}: {next(iter(what))}" for field, what in left.items()]
        raise ConfigError(f"GGUF as transformers reads it does not hold {'; '.join(missing)} …")


def _find_split(model: Any, tokenizer: Any, family: str, trial: Path) -> str:
    """The name of the text splitting with which transformers reads the same tokenizer from the
    file. Raises ConfigError if none does.
    """
    from transformers import AutoTokenizer

    if tokenizer is None:
        return SPLITS[0]
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ConfigError(
            f"{type(tokenizer).__name__} has no tokenizer.json, which GGUF export reads tokens "
            "and merges from"
        )
    want = tokenizer(PROBE).input_ids
    for split in SPLITS:
        write_file(trial, model, tokenizer, family, split, None)
        read = AutoTokenizer.from_pretrained(trial.parent, gguf_file=trial.name)
        if read(PROBE).input_ids == want and read.decode(want) == tokenizer.decode(want):
            return split
    raise ConfigError(
        f"transformers reads another tokenizer from GGUF, whichever of {', '.join(SPLITS)} names "
        "how text is split"
    )


def main(argv: list[str]) -> int:
    """`prunekit export PATH --gguf FILE [--type f32|f16|q8_0]`."""
    parser = argparse.ArgumentParser(
        prog="prunekit export", description="Write a checkpoint folder as one GGUF file."
    )
    parser.add_argument("path", help="a checkpoint folder that prunekit wrote")
    parser.add_argument("--gguf", required=True, metavar="FILE", help="the file to write")
    parser.add_argument(
        "--type",
        default="f16",
        choices=("f32", "f16", "q8_0"),
        help="how matrices are stored (default: %(default)s)",
    )
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    log.info("wrote %s", export_gguf(given.path, given.gguf, type=given.type))
    return 0
