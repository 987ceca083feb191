"""Tokens a second in llama.cpp, the dense model beside the pruned one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from prunekit.evals.engine_speed import measured
from prunekit.export.engine_process import interpreter
from prunekit.export.gguf import write_gguf
from prunekit.export.gguf_file import Type
from prunekit.registry import Component, Natural, Positive, evals
from prunekit.types import Dense


def check_llamacpp(calib: Component, **_: Any) -> None:
    """Raises ConfigError where there is no llama.cpp."""
    interpreter("llama.cpp")


@evals.register(needs="dense", cached=False, check=check_llamacpp, context=("prompt", "new_tokens"))
def llamacpp(
    model: nn.Module,
    tokenizer: Any,
    dense: Dense,
    *,
    type: Type = "f16",
    prompt: Positive = 256,
    new_tokens: Positive = 64,
    repeats: Positive = 5,
    warmup: Natural = 1,
    threads: Positive | None = None,
) -> dict[str, float]:
    """Tokens a second in llama.cpp, of prefill and of decode, and the size of the file, as
    `prunekit export --to gguf` writes it; of a pruned model beside the dense one, in turns in one
    process.

    Keys begin with `llamacpp_<type>_`: `prefill_tokens_per_s`, `decode_tokens_per_s` and `mib`; of
    another model than the dense one also `dense_prefill_tokens_per_s`, `dense_decode_tokens_per_s`,
    `prefill_speedup` and `decode_speedup`. Medians, of the speedups over pairs of requests.

    Args:
        type: how matrices are stored.
        prompt: tokens read at once.
        new_tokens: tokens written after the first, one at a time.
        repeats: requests that are measured.
        warmup: requests before that go unmeasured.
        threads: of the engine; null is what it takes by itself.

    A model that GGUF cannot hold is skipped with a warning that says why. Raises ConfigError where
    there is no llama.cpp: the package xllamacpp here, or an interpreter that has it in
    PRUNEKIT_LLAMACPP.
    """
    request = {"prompt": prompt, "new_tokens": new_tokens, "repeats": repeats, "warmup": warmup}

    def write(of: nn.Module, path: Path) -> Path:
        return write_gguf(of, tokenizer, path.with_suffix(".gguf"), type=type)

    return measured(
        "llama.cpp",
        "time_llamacpp.py",
        model,
        dense,
        write=write,
        request=request | {"threads": threads},
        key=f"llamacpp_{type}",
    )
