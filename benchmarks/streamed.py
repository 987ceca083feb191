"""Peak memory and seconds of pruning a model that stays on the disk (`model.weights=disk`).

    python benchmarks/streamed.py write 7b FOLDER         # random weights, shard by shard, bfloat16
    python benchmarks/streamed.py write moe FOLDER        # 24 blocks of 48 experts: 20 GB
    python benchmarks/streamed.py run FOLDER [METHOD ..]  # wanda flap taylor shortgpt; MoE: reap
    python benchmarks/streamed.py equal FOLDER [METHOD ..]  # also in memory: the same files?

Each method has a process of its own, which may not take more than 6 GiB of memory of its own once
the model is read (RLIMIT_DATA; a mapped file does not count there). The peak is VmHWM: all that was
resident, pages of mapped files included. Text: 8 x 128 random tokens (TOKENS=4x32 for others).
Forwards are in float32 (`model.compute=float32`), which a CPU is quick at. Room on the disk: three
times the model.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LIMIT = 6 * 2**30
SIZES = {  # hidden, neurons, heads, key/value heads, blocks, vocabulary, experts of a mixture
    "tiny": (64, 176, 4, 2, 4, 512),
    "1b": (2048, 5632, 32, 4, 22, 32000),
    "7b": (4096, 11008, 32, 32, 32, 32000),
    "tiny_moe": (64, 96, 4, 2, 4, 512, 8),
    "moe": (2048, 1408, 32, 4, 24, 32000, 48),
}
DENSE = ("wanda", "flap", "shortgpt")
Part = dict[str, Any]
METHODS: dict[str, tuple[Part, Part, Part]] = {
    "wanda": (
        {"name": "unstructured"},
        {"name": "wanda"},
        {"name": "uniform", "target": 0.5, "of": "prunable"},
    ),
    "flap": (
        {"name": "layerwise", "compensate": "bias"},
        {"name": "flap"},
        {"name": "uniform", "target": 0.2, "of": "units"},
    ),
    "taylor": (
        {"name": "oneshot", "kinds": ["neurons"]},
        {"name": "taylor"},
        {"name": "uniform", "target": 0.2, "of": "units"},
    ),
    "shortgpt": (
        {"name": "oneshot", "kinds": ["blocks"]},
        {"name": "block_influence"},
        {"name": "uniform", "target": 0.25, "of": "units"},
    ),
    "reap": (
        {"name": "layerwise", "kinds": ["experts"]},
        {"name": "experts"},
        {"name": "uniform", "target": 0.25, "of": "units"},
    ),
}


def write(size: str, folder: Path) -> None:
    """A Llama, or a Mixtral, of random bfloat16 weights, one shard a block."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, MixtralConfig

    from prunekit.models.tiny import byte_tokenizer

    hidden, ffn, heads, kv, layers, vocabulary, *experts = SIZES[size]
    more: dict[str, Any] = {"num_local_experts": experts[0]} if experts else {}
    config: Any = (MixtralConfig if experts else LlamaConfig)(
        vocab_size=vocabulary,
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        dtype=torch.bfloat16,
        architectures=["MixtralForCausalLM" if experts else "LlamaForCausalLM"],
        **more,
    )
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    places = {}
    for number, shard in enumerate(shards(config)):
        file = f"model-{number + 1:05}-of-{layers + 1:05}.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        places |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def shards(config: Any) -> Iterator[dict[str, Tensor]]:
    """The tensors of each block, then the others."""
    draw = torch.Generator().manual_seed(0)
    C, F = config.hidden_size, config.intermediate_size
    kv = C // config.num_attention_heads * config.num_key_value_heads
    experts: int = getattr(config, "num_local_experts", 0)
    pool = torch.randn(2**26 if experts else 0, generator=draw)
    pools = {n: (pool * n**-0.5).to(torch.bfloat16) for n in (C, F)}

    def normal(rows: int, columns: int) -> Tensor:
        if experts and rows * columns < len(pool) and columns in pools:  # drawn once: no two alike
            start = int(torch.randint(len(pool) - rows * columns, (), generator=draw))
            return pools[columns][start : start + rows * columns].view(rows, columns).clone()
        drawn = torch.randn(rows, columns, generator=draw) * columns**-0.5
        return drawn.to(torch.bfloat16)

    def feed_forward(at: str) -> dict[str, Tensor]:
        if not experts:
            found = {f"{at}mlp.{n}_proj.weight": normal(F, C) for n in ("gate", "up")}
            return found | {f"{at}mlp.down_proj.weight": normal(C, F)}
        # Stacked, as they are computed: no room is needed on the disk to stack them anew.
        both = [torch.cat([normal(F, C), normal(F, C)]) for _ in range(experts)]
        return {
            f"{at}mlp.gate.weight": normal(experts, C),
            f"{at}mlp.experts.gate_up_proj": torch.stack(both),
            f"{at}mlp.experts.down_proj": torch.stack([normal(C, F) for _ in range(experts)]),
        }

    ones = torch.ones(C, dtype=torch.bfloat16)
    shapes = {"q": (C, C), "k": (kv, C), "v": (kv, C), "o": (C, C)}
    for b in range(config.num_hidden_layers):
        at = f"model.layers.{b}."
        yield (
            {f"{at}self_attn.{n}_proj.weight": normal(*s) for n, s in shapes.items()}
            | feed_forward(at)
            | {f"{at}{n}_layernorm.weight": ones.clone() for n in ("input", "post_attention")}
        )
    ends = ("model.embed_tokens.weight", "lm_head.weight")
    yield {n: normal(config.vocab_size, C) for n in ends} | {"model.norm.weight": ones}


def prune(folder: Path, method: str, weights: str, out: Path) -> dict[str, float]:
    """Load, prune and write once in this process; seconds of each, and the peak in MiB, also of
    pruning alone.
    """
    from prunekit import checkpoint
    from prunekit.problem import CALIBRATION, Problem
    from prunekit.profiling import Peak
    from prunekit.registry import criteria, models, pruners, ratios

    pruner, criterion, ratio = METHODS[method]
    node = {"name": "hf", "path": str(folder), "weights": weights, "compute": "float32"}
    node["device"] = "cpu"
    samples, length = map(int, os.environ.get("TOKENS", "8x128").split("x"))
    draw = torch.Generator().manual_seed(0)
    clock = [time.perf_counter()]
    with Peak() as peak:
        model, tokenizer = models.build(node)()
        if weights == "disk":  # now, since safetensors maps all shards at once to read one
            resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
        clock.append(time.perf_counter())
        tokens = torch.randint(3, model.config.vocab_size, (samples, length), generator=draw)
        problem = Problem(
            model,
            tokenizer,
            {CALIBRATION: tokens},
            criteria.build(criterion),
            ratios.build(ratio),
        )
        with Peak() as at_work:
            pruned = pruners.build(pruner)(problem)
        clock.append(time.perf_counter())
        pruned.kept.clear()  # Wanda's masks: half as large as the model, and in the way on the disk
        checkpoint.save(pruned.model, tokenizer, out, max_shard_size="1GB")
        clock.append(time.perf_counter())
    load, work, save = (b - a for a, b in itertools.pairwise(clock))
    return {"load": load, "prune": work, "save": save, "peak": peak.mib, "at_work": at_work.mib}


def started(folder: Path, method: str, weights: str, out: Path) -> dict[str, float]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "once", str(folder), method, weights, str(out)]
    text = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    found: dict[str, float] = json.loads(text.splitlines()[-1])
    return found


def table(folder: Path, methods: list[str], compare: bool) -> None:
    """A row a method; with `compare` also whether a run in memory writes the same files."""
    size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    print(f"{size / 2**30:.1f} GiB of weights", flush=True)
    titles = ["method", "copy to the disk, s", "prune, s", "write, s", "peak, GiB"]
    titles += ["peak while pruning, MiB", "equal"]
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}", flush=True)
    for method in methods:
        with tempfile.TemporaryDirectory(dir=folder.parent) as top:
            there, here = Path(top) / "disk", Path(top) / "memory"
            r, same = started(folder, method, "disk", there), "-"
            if compare:
                whole = started(folder, method, "memory", here)
                same = f"{'yes' if alike(there, here) else 'NO'} ({whole['peak'] / 1024:.1f} GiB)"
            row = [f"{r[k]:.0f}" for k in ("load", "prune", "save")]
            row += [f"{r['peak'] / 1024:.1f}", f"{r['at_work']:,.0f}", same]
            print(f"| {method} | {' | '.join(row)} |", flush=True)


def alike(a: Path, b: Path) -> bool:
    """Whether two checkpoints have the same weights, to the byte."""
    names = sorted(p.name for p in a.glob("*.safetensors"))
    assert names
    return names == sorted(p.name for p in b.glob("*.safetensors")) and all(
        (a / n).read_bytes() == (b / n).read_bytes() for n in names
    )


def main(what: str, *words: str) -> None:
    """See the top."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if what == "write":
        target = Path(words[1])
        shutil.rmtree(target, ignore_errors=True)
        write(words[0], target)
    elif what == "once":
        folder, method, weights, out = words
        print(json.dumps(prune(Path(folder), method, weights, Path(out))))
    else:
        table(Path(words[0]).resolve(), list(words[1:]) or list(DENSE), what == "equal")


if __name__ == "__main__":
    main(*sys.argv[1:])
