"""How fast llama.cpp reads and writes; run as a script, in a process of its own.

It imports nothing but xllamacpp, so the interpreter may be that of another environment. Reads one
JSON list of requests {"paths", "prompt", "new_tokens", "repeats", "warmup", "threads"} from
standard input, writes one line of JSON an answer: {"times"}, for each GGUF file a list of [seconds
of the prompt, seconds of all further tokens], or {"error"}.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import xllamacpp


def serve(path: str, tokens: int, threads: int | None) -> xllamacpp.Server:
    """The model, loaded, with room for so many tokens."""
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = max(256, tokens + 8)
    params.n_parallel = 1
    if threads is not None:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cache_prompt = False
    params.verbosity = -1
    return xllamacpp.Server(params)


def timed(server: xllamacpp.Server, prompt: int, new_tokens: int) -> list[float]:
    """Seconds that the prompt took, which gives the first token, and those of `new_tokens` more, by
    llama.cpp's own clock.
    """
    request = {"prompt": [5] * prompt, "max_tokens": new_tokens + 1, "temperature": 0}
    answer = server.handle_completions({**request, "ignore_eos": True, "cache_prompt": False})
    answer = answer if isinstance(answer, dict) else json.loads(answer)
    if "timings" not in answer:
        raise ValueError(str(answer))
    seen = answer["timings"]
    if (seen["prompt_n"], seen["predicted_n"]) != (prompt, new_tokens + 1):
        raise ValueError(f"llama.cpp read and wrote another number of tokens: {seen}")
    return [seen["prompt_ms"] / 1000, seen["predicted_ms"] / 1000]


def measure(
    paths: list[str], prompt: int, new_tokens: int, repeats: int, warmup: int, threads: int | None
) -> dict[str, Any]:
    """All files in turns, so that whatever else the machine does slows all of them."""
    servers = [serve(path, prompt + new_tokens + 1, threads) for path in paths]
    rounds = [[timed(s, prompt, new_tokens) for s in servers] for _ in range(warmup + repeats)]
    return {"times": [list(of) for of in zip(*rounds[warmup:])]}


def main() -> None:
    for request in json.load(sys.stdin):
        try:
            answer = measure(**request)
        except (RuntimeError, TypeError, ValueError, OSError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
