"""Greedy completions of GGUF files by the real llama.cpp; run as a script, in a process of its own.

It imports nothing but xllamacpp, so the interpreter may be that of another environment. Reads one
JSON list of requests {"file", "prompt": token ids, "count", "threads"} from standard input, writes
one line of JSON an answer: {"tokens", "logprobs", "timings"} or {"error"}.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import xllamacpp


def complete(file: str, prompt: list[int], count: int, threads: int = 1) -> dict[str, Any]:
    """Token ids, log probabilities, and llama.cpp's own timings."""
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx = max(512, len(prompt) + count + 8)
    params.n_parallel = 1
    params.cpuparams.n_threads = threads
    params.warmup = False
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    # In float32 throughout: flash attention on a CPU and the default cache are of float16.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.verbosity = -1
    server = xllamacpp.Server(params)
    request = {"prompt": prompt, "max_tokens": count, "temperature": 0, "logprobs": 1}
    answer = server.handle_completions({**request, "ignore_eos": True})
    answer = answer if isinstance(answer, dict) else json.loads(answer)
    if "choices" not in answer:
        return {"error": str(answer)}
    seen = answer["choices"][0]["logprobs"]["content"]
    return {
        "tokens": [t["id"] for t in seen],
        "logprobs": [t["logprob"] for t in seen],
        "timings": answer.get("timings", {}),
    }


def main() -> None:
    for request in json.load(sys.stdin):
        try:
            answer = complete(**request)
        except (RuntimeError, TypeError, ValueError, OSError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
