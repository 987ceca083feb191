"""A random Llama of a few thousand parameters with a byte tokenizer: everything runs on it in
seconds, nothing is downloaded.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from prunekit.errors import ConfigError
from prunekit.models import default_device, resolved_dtype
from prunekit.models.devices import Device
from prunekit.registry import Positive, Seed, models

Layers = Annotated[int, Field(gt=0, le=256)]
Width = Annotated[int, Field(gt=0, le=2**14)]
Context = Annotated[int, Field(ge=2, le=2**20)]
SPECIAL = ("<pad>", "<s>", "</s>")


def byte_tokenizer() -> Any:
    """A tokenizer of 259 ids: padding, beginning, end, then one id per byte; it puts `<s>` in front
    as Llama's does.
    """
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    vocab = {
        token: i for i, token in enumerate((*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())))
    }
    plain = Tokenizer(BPE(vocab=vocab, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.decoder = decoders.ByteLevel()
    plain.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    pad, bos, eos = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token=pad, bos_token=bos, eos_token=eos
    )


@models.register()
def tiny_llama(
    meta: bool = False,
    *,
    layers: Layers = 4,
    hidden: Width = 64,
    ffn: Width = 128,
    heads: Positive = 4,
    kv_heads: Positive = 2,
    context: Context = 2048,
    tie: bool = False,
    seed: Seed = 0,
    dtype: Literal["fast", "float32", "bfloat16", "float16"] = "float32",
    device: Device = None,
) -> tuple[nn.Module, Any]:
    """A Llama with random weights, grouped-query attention and a byte tokenizer, for tests and
    trials in seconds.

    `seed` draws the weights without touching the global generator. Raises ConfigError for heads
    that do not divide what they share.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    if hidden % (2 * heads):
        raise ConfigError(
            f"model=tiny_llama: hidden={hidden} channels are not an even number for each of "
            f"heads={heads}"
        )
    if heads % kv_heads:
        raise ConfigError(f"model=tiny_llama: kv_heads={kv_heads} do not divide heads={heads}")
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + 256,
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        tie_word_embeddings=tie,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    kind = getattr(torch, resolved_dtype(dtype, device))
    if meta:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=kind).eval(), None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=kind).eval()
    return model.to(device or default_device()), byte_tokenizer()
