"""The bytes of a GGUF file: facts, tensors, and the tokenizer with its tokens and merges."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from tqdm import tqdm

from prunekit.errors import ConfigError
from prunekit.export.gguf_content import Content
from prunekit.export.k_quants import engine_quantiser

log = logging.getLogger("prunekit")
Type = Literal["f32", "f16", "bf16", "q8_0", "q4_k"]
TYPES: tuple[Type, ...] = get_args(Type)
BLOCK = 32
"""Weights that share a scale in Q8_0, along the last axis."""
SUPER_BLOCK = 256
"""Weights that k-quants take together, along the last axis."""
WHOLE = ("ffn_gate_inp", "position_embd")
"""Matrices that k-quants leave in float32, as llama.cpp does."""


class Words(NamedTuple):
    """A tokenizer, and the name that GGUF has for how it cuts text before merging."""

    tokenizer: Any
    split: str


def coding_of(name: str, shape: tuple[int, ...], type: Type) -> Any:
    """The type that a tensor of this name and shape gets: vectors stay float32, as everywhere in
    GGUF. `q4_k` is Q4_K, for embedding and output Q6_K; rows that are no multiple of 256 are Q5_0
    and Q8_0 then, as llama.cpp has it.
    """
    from gguf import GGMLQuantizationType as Q

    if len(shape) == 1 or type == "f32":
        return Q.F32
    if type in ("f16", "bf16"):
        return Q.BF16 if type == "bf16" else Q.F16
    if shape[-1] % BLOCK:
        return Q.F16
    if type == "q8_0":
        return Q.Q8_0
    if name.startswith(WHOLE) or any(f".{part}." in name for part in WHOLE):
        return Q.F32
    fine = name.startswith(("token_embd.", "output."))
    if shape[-1] % SUPER_BLOCK:
        return Q.Q8_0 if fine else Q.Q5_0
    return Q.Q6_K if fine else Q.Q4_K


def write_file(file: Path, content: Content, words: Words | None, type: Type | None) -> None:
    """Facts, the tokenizer of `words` where there is one, and with a `type` the tensors, one after
    another.
    """
    from gguf import GGMLQuantizationType as Q
    from gguf import GGUFWriter, LlamaFileType, quant_shape_to_byte_shape
    from gguf.quants import quantize

    writer = GGUFWriter(file, content.arch)
    writer.add_name("pruned")
    writer.add_file_type(
        {
            "f32": LlamaFileType.ALL_F32,
            "bf16": LlamaFileType.MOSTLY_BF16,
            "q8_0": LlamaFileType.MOSTLY_Q8_0,
            "q4_k": LlamaFileType.MOSTLY_Q4_K_S,
        }.get(type or "", LlamaFileType.MOSTLY_F16)
    )
    for name, value in content.facts.items():
        getattr(writer, f"add_{name}")(value)
    if words is not None:
        add_tokenizer(writer, words, content.facts["vocab_size"])
    codings = [coding_of(e.name, e.shape, type or "f32") for e in content.entries if type]
    for e, coding in zip(content.entries, codings):
        dtype = np.dtype({Q.F32: np.float32, Q.F16: np.float16}.get(coding, np.uint8))
        stored: Any = e.shape
        if dtype == np.uint8:
            stored = quant_shape_to_byte_shape(e.shape, coding)
        size = int(np.prod(stored)) * dtype.itemsize
        writer.add_tensor_info(e.name, stored, dtype, size, raw_dtype=coding)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    encode = engine_quantiser() if type == "q4_k" else quantize
    several = list(zip(content.entries, codings))
    for e, coding in tqdm(several, desc=file.name, unit="tensor", disable=len(several) < 50):
        by = quantize if coding in (Q.F32, Q.F16) else encode
        writer.write_tensor_data(by(e.get().numpy(), coding))
    writer.close()
    say_fallbacks(content, codings, type)


def say_fallbacks(content: Content, codings: list[Any], type: Type | None) -> None:
    """Tells the user of matrices whose rows do not suit the type."""
    wanted = {"q8_0": ("Q8_0",), "q4_k": ("Q4_K", "Q6_K", "F32")}.get(type or "", ())
    for e, coding in zip(content.entries, codings):
        if wanted and len(e.shape) > 1 and coding.name not in wanted:
            log.info("%s: rows of %d, written as %s", e.name, e.shape[-1], coding.name)


def add_tokenizer(writer: Any, words: Words, rows: int) -> None:
    """Tokens, merges, kinds of tokens and special ids of a byte-pair tokenizer; rows without a
    token are marked unused.
    """
    from gguf import TokenType as T

    tokenizer = words.tokenizer
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model, added = content["model"], {a["id"]: a for a in content["added_tokens"]}
    if model["type"] != "BPE":
        raise ConfigError(f"GGUF export writes byte-pair tokenizers, this one is {model['type']}")
    fallback = model.get("byte_fallback")
    by_id = {i: t for t, i in model["vocab"].items()} | {i: a["content"] for i, a in added.items()}
    kinds = []
    for i in range(rows):
        text = by_id.get(i)
        if text is None:
            kinds.append(T.UNUSED)
        elif i in added:
            kinds.append(T.CONTROL if added[i]["special"] else T.USER_DEFINED)
        else:
            byte = fallback and text.startswith("<0x") and len(text) == 6
            kinds.append(T.BYTE if byte else T.NORMAL)
    writer.add_tokenizer_model("llama" if fallback else "gpt2")
    writer.add_tokenizer_pre("default" if fallback else words.split)
    writer.add_token_list([by_id.get(i, f"[PAD{i}]") for i in range(rows)])
    writer.add_token_scores([float(-i) for i in range(rows)])
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    for key in ("bos", "eos", "unk", "pad"):
        value = getattr(tokenizer, f"{key}_token_id")
        if value is not None:
            getattr(writer, f"add_{key}_token_id")(value)
    ids, bos, eos = tokenizer("a").input_ids, tokenizer.bos_token_id, tokenizer.eos_token_id
    writer.add_add_bos_token(bos is not None and ids[:1] == [bos])
    writer.add_add_eos_token(eos is not None and ids[-1:] == [eos])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
