"""Write a checkpoint that stock transformers loads as one GGUF file, tokenizer included; what the
format cannot tell is refused.

Nothing is taken on trust: the metadata is read back by transformers' own GGUF reader, and the
config and the tokens that come of it are compared with the model's before the tensors are written.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from prunekit.checkpoint.config_fit import edited, mirrored
from prunekit.checkpoint.layout import clean_config, difference
from prunekit.errors import ConfigError

log = logging.getLogger("prunekit")
Type = Literal["f32", "f16", "q8_0"]
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
BLOCK = 32
"""Weights that share a scale in Q8_0, along the last axis."""


def export_gguf(path: str | Path, out: str | Path, *, type: Type = "f16") -> Path:
    """Write the checkpoint folder `path` as the GGUF file `out`, which appears only when it is
    complete.

    f32 is exact for float32 weights, f16 and q8_0 round (q8_0: 8 bits and a scale per 32; rows that
    are no multiple of 32 stay f16). Raises ConfigError with the reason for a model or tokenizer
    that the format, as transformers reads it, cannot tell.
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
        split = _settle_tokenizer(model, tokenizer, family, trial)
        _write(trial, model, tokenizer, family, split, None)
        _check_config(model, trial)
        whole = Path(aside) / "whole.gguf"
        _write(whole, model, tokenizer, family, split, type)
        with whole.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(whole, out)
    return out


def _family(model: Any) -> str:
    from prunekit.checkpoint.remote_code.runtime_modules import LAYOUT

    kind = model.config.model_type
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
    rounded = {
        k: v for k, v in floats.items() if np.float32(v) == np.float32(getattr(read, k))
    }  # GGUF holds float32
    read = edited(
        read, tie_word_embeddings=mine.tie_word_embeddings, **rounded
    )  # the trial has no tensors to tell tied ones from
    if read is None:
        raise ConfigError(f"GGUF reads as a {mine.model_type} whose sizes its config class refuses")
    read._attn_implementation = mine._attn_implementation
    left = difference(model, read, mirrored(model, read), own_configs=False)
    if left:
        told = [f"{field}: {next(iter(what))}" for field, what in left.items()]
        raise ConfigError(f"GGUF, as transformers reads it, does not tell of {'; '.join(told)} …")


# ---- tensors


def _tensors(model: Any, family: str) -> list[tuple[str, torch.Size, Callable[[], Tensor]]]:
    """(name in GGUF, shape, how to get the tensor); raises ConfigError for a tensor that the format
    has no name for.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    config = model.config
    arch = next(k for k, v in MODEL_ARCH_NAMES.items() if v == family)
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    found: list[tuple[str, torch.Size, Callable[[], Tensor]]] = []
    tied = {n for n, p in model.named_parameters(remove_duplicate=False)} - {
        n for n, p in model.named_parameters()
    }
    for name, tensor in model.state_dict().items():
        stem, _, leaf = name.rpartition(".")
        called = names.get_name(stem)
        if name in tied:
            continue
        if called is None:
            raise ConfigError(
                f"GGUF has no name for the tensor {name} in the architecture {family}"
            )
        heads = 0
        if family == "llama" and stem.endswith((".q_proj", ".k_proj")):
            heads = (
                config.num_attention_heads
                if stem.endswith(".q_proj")
                else config.num_key_value_heads
            )
        found.append((f"{called}.{leaf}", tensor.shape, _getter(tensor, heads)))
    return found


def _getter(tensor: Tensor, heads: int) -> Callable[[], Tensor]:
    def get() -> Tensor:
        t = tensor.detach().cpu().float()
        # GGUF's Llama pairs neighbouring channels for rotary embedding, transformers pairs the two
        # halves of a head
        if heads:
            t = (
                t.reshape(heads, 2, t.shape[0] // heads // 2, *t.shape[1:])
                .transpose(1, 2)
                .reshape(t.shape)
            )
        return t.contiguous()

    return get


def _coding(shape: torch.Size, type: Type) -> Any:
    """The type that a tensor of this shape gets: vectors stay float32, as everywhere in GGUF."""
    from gguf import GGMLQuantizationType as Q

    if len(shape) == 1 or type == "f32":
        return Q.F32
    return Q.Q8_0 if type == "q8_0" and shape[-1] % BLOCK == 0 else Q.F16


def _write(
    file: Path, model: Any, tokenizer: Any, family: str, split: str, type: Type | None
) -> None:
    """Metadata, and with `type` the tensors, one after another."""
    from gguf import GGMLQuantizationType as Q
    from gguf import GGUFWriter, quant_shape_to_byte_shape
    from gguf.quants import quantize

    writer = GGUFWriter(file, family)
    _metadata(writer, model, type)
    if tokenizer is not None:
        _tokenizer(writer, tokenizer, model.get_input_embeddings().weight.shape[0], split)
    plan = []
    for name, shape, get in _tensors(model, family) if type else []:
        coding = _coding(shape, type or "f32")
        if type == "q8_0" and coding is Q.F16:
            log.info("%s: rows of %d are no multiple of %d, written as f16", name, shape[-1], BLOCK)
        dtype, bytes_ = (
            np.dtype(np.float32 if coding is Q.F32 else np.float16),
            shape.numel() * (4 if coding is Q.F32 else 2),
        )
        stored: Any = tuple(shape)
        if coding is Q.Q8_0:
            stored = quant_shape_to_byte_shape(tuple(shape), coding)
            dtype, bytes_ = np.dtype(np.uint8), int(np.prod(stored))
        writer.add_tensor_info(name, stored, dtype, bytes_, raw_dtype=coding)
        plan.append((get, coding))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for get, coding in tqdm(plan, desc=file.name, unit="tensor", disable=len(plan) < 50):
        writer.write_tensor_data(quantize(get().numpy(), coding))
    writer.close()


def _metadata(writer: Any, model: Any, type: Type | None) -> None:
    from gguf import LlamaFileType as F

    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name("pruned")
    writer.add_file_type({"f32": F.ALL_F32, "q8_0": F.MOSTLY_Q8_0}.get(type or "", F.MOSTLY_F16))
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


# ---- tokenizer


def _tokenizer(writer: Any, tokenizer: Any, rows: int, split: str) -> None:
    """Tokens, merges, kinds of tokens and special ids of a byte-pair tokenizer; rows without a
    token are marked unused.
    """
    from gguf import TokenType as T

    told = json.loads(tokenizer.backend_tokenizer.to_str())
    model, added = told["model"], {a["id"]: a for a in told["added_tokens"]}
    if model["type"] != "BPE":
        raise ConfigError(f"GGUF export writes byte-pair tokenizers, this one is {model['type']}")
    by_id = {i: t for t, i in model["vocab"].items()} | {i: a["content"] for i, a in added.items()}
    kinds = []
    for i in range(rows):
        text = by_id.get(i)
        if text is None:
            kinds.append(T.UNUSED)
        elif i in added:
            kinds.append(T.CONTROL if added[i]["special"] else T.USER_DEFINED)
        else:
            kinds.append(
                T.BYTE
                if model.get("byte_fallback") and text.startswith("<0x") and len(text) == 6
                else T.NORMAL
            )
    writer.add_tokenizer_model("llama" if model.get("byte_fallback") else "gpt2")
    writer.add_tokenizer_pre("default" if model.get("byte_fallback") else split)
    writer.add_token_list([by_id.get(i, f"[PAD{i}]") for i in range(rows)])
    writer.add_token_scores([float(-i) for i in range(rows)])
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    for key in ("bos", "eos", "unk", "pad"):
        value = getattr(tokenizer, f"{key}_token_id")
        if value is not None:
            getattr(writer, f"add_{key}_token_id")(value)
    first = tokenizer("a").input_ids
    writer.add_add_bos_token(
        tokenizer.bos_token_id is not None and first[:1] == [tokenizer.bos_token_id]
    )
    writer.add_add_eos_token(
        tokenizer.eos_token_id is not None and first[-1:] == [tokenizer.eos_token_id]
    )
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _settle_tokenizer(model: Any, tokenizer: Any, family: str, trial: Path) -> str:
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
        _write(trial, model, tokenizer, family, split, None)
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
