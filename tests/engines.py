"""Real serving engines for tests, and models and answers to compare theirs with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from prunekit.errors import ConfigError
from prunekit.export.engine_process import Engine, ask, interpreter

VOCAB = 293
PROMPT = list(range(5, 17))


def needs(engine: Engine) -> None:
    """Skips the test where the engine is not here."""
    try:
        interpreter(engine)
    except ConfigError as error:
        pytest.skip(str(error))


def completed(
    engine: Engine, requests: list[dict[str, Any]], count: int = 12
) -> list[dict[str, Any]]:
    """What the engine answers to `PROMPT`, greedily."""
    script = {"llama.cpp": "serve_llamacpp.py", "vLLM": "serve_vllm.py"}[engine]
    return ask(engine, script, [{**r, "prompt": PROMPT, "count": count} for r in requests])


def ascii_tokenizer() -> Any:
    """293 tokens, each of them whole text: engines hold back bytes that are no character yet."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = "etaoinshrdlcum"
    pairs = [(a, b) for a in letters for b in letters]
    words = ["<|endoftext|>", *map(chr, range(33, 127)), "\u0120", "\u010a"]
    words += [a + b for a, b in pairs]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    )


@torch.no_grad()
def greedy(model: nn.Module, count: int = 12) -> tuple[list[int], list[float]]:
    """Tokens and log probabilities after `PROMPT` by transformers, the end of text left out."""
    ids, logs = list(PROMPT), []
    for _ in range(count):
        log = model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
        ids.append(int(log[1:].argmax()) + 1)
        logs.append(float(log[ids[-1]]))
    return ids[len(PROMPT) :], logs
