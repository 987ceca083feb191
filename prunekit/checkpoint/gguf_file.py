"""The content of a GGUF file: metadata, tensors and tokenizer of a model of the Llama family."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from prunekit.errors import ConfigError

log = logging.getLogger("prunekit")
Type = Literal["f32", "f16", "q8_0"]
BLOCK = 32
"""Weights that share a scale in Q8_0, along the last axis."""


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
        gguf_name = names.get_name(stem)
        if name in tied:
            continue
        if gguf_name is None:
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
        found.append((f"{gguf_name}.{leaf}", tensor.shape, _getter(tensor, heads)))
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


def write_file(
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


def _tokenizer(writer: Any, tokenizer: Any, rows: int, split: str) -> None:
    """Tokens, merges, kinds of tokens and special ids of a byte-pair tokenizer; rows without a
    token are marked unused.
    """
    from gguf import TokenType as T

    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model, added = content["model"], {a["id"]: a for a in content["added_tokens"]}
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
