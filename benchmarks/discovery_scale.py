"""How long discovery takes, and how much memory, on configs of real size with no weights: time and
peak resident memory per model.

    python benchmarks/discovery_scale.py             # all, each in a process of its own
    python benchmarks/discovery_scale.py llama_7b    # only this one
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_7b": (
        "LlamaConfig",
        {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
        },
    ),
    "llama_70b": (
        "LlamaConfig",
        {
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "num_hidden_layers": 80,
            "vocab_size": 128256,
        },
    ),
    "bloom_7b": (
        "BloomConfig",
        {"hidden_size": 4096, "n_head": 32, "n_layer": 30, "vocab_size": 250880},
    ),
    "mixtral_8x7b": (
        "MixtralConfig",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_local_experts": 8,
        },
    ),
}
AIMS = {"llama_7b": "< 20 s, < 2 GiB", "llama_70b": "< 60 s"}


def measure(name: str) -> dict[str, Any]:
    import torch
    import transformers

    sys.path.insert(0, str(ROOT))
    from prunekit.graph import discover, report

    torch.set_num_threads(1)
    config, sizes = SIZES[name]
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            getattr(transformers, config)(**sizes), dtype=torch.bfloat16
        )
    start, cpu = time.perf_counter(), time.process_time()
    groups = discover(model)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "groups": len(groups),
        "left": len(report(model)),
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(sys.argv[2])))
        return
    print(
        "| model | parameters | groups | left alone | seconds | CPU seconds | peak GiB | aim "
        "|\n|---|---|---|---|---|---|---|---|"
    )
    for name in sys.argv[1:] or SIZES:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", __file__, "--one", name],
            capture_output=True,
            text=True,
            check=True,
        )
        r = json.loads(done.stdout.splitlines()[-1])
        row = (
            name,
            f"{r['parameters']:,}",
            r["groups"],
            r["left"],
            f"{r['seconds']:.1f}",
            f"{r['cpu_seconds']:.1f}",
            f"{r['gib']:.2f}",
            AIMS.get(name, ""),
        )
        print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
