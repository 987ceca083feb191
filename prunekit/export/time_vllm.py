"""How fast vLLM reads and writes; run as a script, in a process of its own.

It imports nothing but vllm, so the interpreter may be that of another environment. Reads one JSON
list of requests {"paths", "prompt", "new_tokens", "repeats", "warmup", "batch", "dtype", "share",
"compiled"} from standard input, writes one line of JSON an answer: {"times"}, for each folder a
list of [seconds of the prompts, seconds of all further tokens], or {"error"}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from vllm import LLM, SamplingParams


def timed(engine: LLM, prompt: int, new_tokens: int, batch: int) -> list[float]:
    """Seconds that `batch` prompts took, which gives the first token of each, and those of
    `new_tokens` more: what a request for all takes longer than one for the first.
    """
    took = []
    for count in (1, new_tokens + 1):
        how = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        prompts = [{"prompt_token_ids": [5 + i] * prompt} for i in range(batch)]
        start = time.perf_counter()
        engine.generate(prompts, how, use_tqdm=False)
        took.append(time.perf_counter() - start)
    return [took[0], max(took[1] - took[0], 1e-9)]


def measure(
    paths: list[str],
    prompt: int,
    new_tokens: int,
    repeats: int,
    warmup: int,
    batch: int,
    dtype: str,
    share: float,
    compiled: bool,
) -> dict[str, Any]:
    """All folders in turns, so that whatever else the machine does slows all of them."""
    engines = [
        LLM(
            model=path,
            trust_remote_code=True,
            dtype=dtype,
            max_model_len=prompt + new_tokens + 1,
            max_num_seqs=batch,
            enforce_eager=not compiled,
            enable_prefix_caching=False,
            gpu_memory_utilization=share,
        )
        for path in paths
    ]
    rounds = [
        [timed(e, prompt, new_tokens, batch) for e in engines] for _ in range(warmup + repeats)
    ]
    return {"times": [list(of) for of in zip(*rounds[warmup:])]}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints
    for request in json.load(sys.stdin):
        try:
            answer = measure(**request)
        except (RuntimeError, TypeError, ValueError, OSError, AttributeError, AssertionError) as e:
            answer = {"error": f"{type(e).__name__}: {e}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
