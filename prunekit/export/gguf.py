"""Write a checkpoint as one GGUF file for llama.cpp, tokenizer included; what the engine would
compute differently is refused.

Nothing is taken on trust: the model is compared with what its class builds, up to what the
architecture in GGUF has a place for, and the tokenizer is read back by transformers and compared.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from prunekit.checkpoint.block_configs import LIKE_LLAMA
from prunekit.errors import ConfigError
from prunekit.export.gguf_content import Content
from prunekit.export.gguf_families import uniform_content
from prunekit.export.gguf_file import TYPES, Type, Words, write_file
from prunekit.export.gguf_uneven import uneven_content
from prunekit.export.k_quants import engine_quantiser

SPLITS = ("gpt-2", "llama-bpe", "qwen2", "tekken", "gpt-4o")
"""Names that GGUF has for how a byte-level tokenizer cuts text before merging."""
PROBE = (
    "The quick brown fox, 12345 + 3.14 = don't  DON'T\n\n\tfür über 東京 Привет 😀 <|endoftext|> "
    "x_y=f(z)[0]; https://a.b/c?d=e  "
)


def export_gguf(path: str | Path, out: str | Path, *, type: Type = "f16") -> Path:
    """Write the checkpoint folder `path` as the GGUF file `out`, which appears only when it is
    complete.

    f32 is exact for float32 weights, f16, bf16 and q8_0 round (q8_0: 8 bits and a scale per 32;
    rows that are no multiple of 32 become f16); q4_k is made by llama.cpp's own quantiser and asks
    for rows that are multiples of 256. Raises ConfigError with the reason for a model or tokenizer
    that the format, as llama.cpp reads it, cannot hold, and for q4_k where there is no llama.cpp.
    """
    from prunekit.checkpoint import load

    model, tokenizer = load(path)
    return write_gguf(model, tokenizer, out, type=type)


def write_gguf(model: Any, tokenizer: Any, out: str | Path, *, type: Type = "f16") -> Path:
    """`export_gguf` for a model in memory; without tokenizer the file holds none."""
    out = Path(out)
    if type not in TYPES:
        raise ConfigError(f"type={type!r}; possible: {', '.join(TYPES)}")
    if type == "q4_k":
        engine_quantiser()  # says what is missing before anything is made
    content = content_of(model)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as aside:
        words = words_of(tokenizer, content, Path(aside) / "trial.gguf")
        whole = Path(aside) / "whole.gguf"
        write_file(whole, content, words, type)
        with whole.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(whole, out)
    return out


def content_of(model: Any) -> Content:
    """Facts and tensors, in the model's own architecture where its layers are alike, else in one
    that has values for each layer. Raises ConfigError where there is neither.
    """
    try:
        return uniform_content(model)
    except ConfigError:
        if model.config.model_type not in LIKE_LLAMA:
            raise
        return uneven_content(model)


def words_of(tokenizer: Any, content: Content, trial: Path) -> Words | None:
    """The tokenizer with the name of the text splitting with which transformers reads the same
    tokenizer from a file, which is written as `trial`. Raises ConfigError if none does.
    """
    from transformers import AutoTokenizer

    if tokenizer is None:
        return None
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ConfigError(
            f"{type(tokenizer).__name__} has no tokenizer.json, which GGUF export reads tokens "
            "and merges from"
        )
    want = tokenizer(PROBE).input_ids
    # transformers reads no file of most architectures; the tokenizer is the same in each.
    readable = replace(
        content, arch="llama", entries=[], facts={"vocab_size": content.facts["vocab_size"]}
    )
    for split in SPLITS:
        write_file(trial, readable, Words(tokenizer, split), None)
        read = AutoTokenizer.from_pretrained(trial.parent, gguf_file=trial.name)
        if read(PROBE).input_ids == want and read.decode(want) == tokenizer.decode(want):
            return Words(tokenizer, split)
    raise ConfigError(
        f"transformers reads another tokenizer from GGUF, whichever of {', '.join(SPLITS)} names "
        "how text is split"
    )
