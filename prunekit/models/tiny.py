"""A random Llama of a few thousand parameters with a byte tokenizer: everything runs on it in
seconds, nothing is downloaded.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from prunekit.models import default_device, resolved_dtype
from prunekit.registry import Natural, Positive, models

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
    layers: Positive = 4,
    hidden: Positive = 64,
    ffn: Positive = 128,
    heads: Positive = 4,
    kv_heads: Positive = 2,
    context: Positive = 2048,
    tie: bool = False,
    seed: Natural = 0,
    dtype: Literal["fast", "float32", "bfloat16", "float16"] = "float32",
    device: str | None = None,
) -> tuple[nn.Module, Any]:
    """A Llama with random weights, grouped-query attention and a byte tokenizer, for tests and
    trials in seconds.

    `seed` draws the weights without touching the global generator.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

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
