"""What a GPU is for besides pruning: sparse kernels, compilation, training, latency, checkpoints,
the real model. Each function is one row of `benchmarks/gpu.py` and returns what it found.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_methods import (
    AGREES,
    ELEMENTS,
    UNITS,
    Bench,
    Disagree,
    Method,
    agreement,
    relative,
    tiny_model,
)
from torch import Tensor, nn

from prunekit import checkpoint, graph
from prunekit.architecture.offload import map_weights
from prunekit.architecture.streaming import stream
from prunekit.checkpoint.semi_structured import semi_structured
from prunekit.models.tiny import byte_tokenizer
from prunekit.registry import evals, recoveries
from prunekit.types import Group, Pruned

MAGNITUDE = Method({"name": "oneshot"}, {"name": "l2"}, UNITS | {"target": 0.5})
PAIRS = Method({"name": "unstructured", "pattern": "2:4"}, {"name": "wanda"}, ELEMENTS)
ARCHITECTURES = ("llama", "gpt2", "opt", "bloom", "phi3", "falcon", "gemma3_text", "qwen2_moe")
ARCHITECTURES += ("mixtral", "deepseek_v3", "mamba", "qwen3")
SHORT = {"dataset": "text", "max_length": 64, "validation_size": 2, "batch": 4, "micro_batch": 2}
SHORT |= {"max_steps": 3, "log_every": 1, "warmup_steps": 0, "samples": 4, "length": 64, "steps": 3}
TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind it at all. "


def forward(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits without gradients."""
    with torch.no_grad():
        logits: Tensor = model(tokens.to(next(model.parameters()).device), use_cache=False).logits
    return logits


def milliseconds(work: Callable[[], Any], bench: Bench, times: int = 10) -> float:
    """Mean of `times` calls after two that do not count, the device waited for."""
    for _ in range(2):
        work()
    wait(bench.device)
    start = time.perf_counter()
    for _ in range(times):
        work()
    wait(bench.device)
    return 1000 * (time.perf_counter() - start) / times


def wait(device: torch.device) -> None:
    """Returns when everything sent to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def linear_algebra(bench: Bench) -> str:
    """Products, factorisations and decompositions: the first use of each library on the device."""
    size = 64 if bench.small else 1024
    x = torch.randn(size, size, device=bench.device)
    gram = x @ x.T + size * torch.eye(size, device=bench.device)
    found = []
    ways: dict[str, Callable[[], Any]] = {
        "bfloat16 product": lambda: x.bfloat16() @ x.bfloat16(),
        "cholesky": lambda: torch.linalg.cholesky(gram),
        "eigh": lambda: torch.linalg.eigh(gram.double()),
        "svd": lambda: torch.linalg.svd(x),
    }
    for name, way in ways.items():
        found.append(f"{name} {milliseconds(way, bench, 2):.2f} ms")
    tf32 = torch.backends.cuda.matmul.allow_tf32
    return f"{', '.join(found)} at {size}; TF32 products {'on' if tf32 else 'off'}"


def sparse_kernels(bench: Bench) -> str:
    """2:4 by Wanda, converted: the same logits, and what the kernel brings."""
    model = bench.model("7B", bench.layers)
    PAIRS.prune(model, bench.tokens())
    tokens = bench.tokens(16)
    expected = forward(model, tokens)
    dense = milliseconds(lambda: forward(model, tokens), bench)
    left = semi_structured(model)
    linear = sum(isinstance(m, nn.Linear) for m in model.modules())
    gap = relative(expected, forward(model, tokens))
    sparse = milliseconds(lambda: forward(model, tokens), bench)
    reasons = ", ".join(sorted(set(left.values())))
    note = f"{linear - len(left)} of {linear} converted, logits {gap:.0e}, "
    note += f"{tokens.numel()} tokens {dense:.1f} -> {sparse:.1f} ms; others: {reasons}"
    if gap > 0.05 or (bench.device.type == "cuda" and len(left) > 1):
        raise Disagree(note)
    return note


def compiled(bench: Bench) -> str:
    """torch.compile of a pruned model: the same logits, and its time."""
    model = bench.model("1.1B", bench.layers)
    MAGNITUDE.prune(model, bench.tokens())
    tokens = bench.tokens(4)
    expected = forward(model, tokens)
    eager = milliseconds(lambda: forward(model, tokens), bench)
    backend = "inductor" if bench.device.type == "cuda" else "aot_eager"
    torch._dynamo.reset()
    fast = torch.compile(model, backend=backend)
    gap = relative(expected, forward(fast, tokens))
    after = milliseconds(lambda: forward(fast, tokens), bench)
    note = f"{backend}, logits {gap:.0e}, {eager:.1f} -> {after:.1f} ms"
    if gap > 0.05:
        raise Disagree(note)
    return note


def pruned_shape(bench: Bench, method: Method = MAGNITUDE) -> tuple[nn.Module, Pruned]:
    """The 1.1B shape with a few blocks, dense and pruned."""
    model = bench.model("1.1B", bench.layers)
    dense = copy.deepcopy(model)
    return dense, method.prune(model, bench.tokens())


def recovered(name: str, bench: Bench) -> str:
    """Three steps of a recovery on what Wanda left, whose zeros stay zero."""
    dense, pruned = pruned_shape(bench, PAIRS)
    # Elements outside of the masks may be zero by chance, and trained.
    keep = graph.zero_masks(pruned.model, pruned.groups, pruned.kept)
    problem = replace(
        PAIRS.problem(pruned.model, bench.tokens()),
        tokenizer=byte_tokenizer(),
        load_dense=lambda: dense,
    )
    taken = recoveries.entry(name).types
    node = {"name": name} | {k: v for k, v in SHORT.items() if k in taken}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.txt"
        path.write_text(TEXT * 40)
        pruned.model = recoveries.build(node | {"path": str(path)})(problem, pruned)
    zeros = sum(int((~free).sum()) for free in keep.values())
    held = {name: pruned.model.get_parameter(name)[~free] for name, free in keep.items()}
    after = sum(int((w == 0).sum()) for w in held.values())
    forward(pruned.model, bench.tokens(1))
    curve = pruned.notes.get("recovery_curve", [])
    losses = [f"{row['loss']:.3g}" for row in curve if "loss" in row]
    found = [f"losses {', '.join(losses)}"] if losses else []
    for block, (before, left) in pruned.notes.get("reconstruction", {}).items():
        found.append(f"{block} {before:.3g} to {left:.3g}")
    note = f"{', '.join(found)}; zeros {zeros:,} -> {after:,}"
    if after < zeros:
        raise Disagree(note)
    return note


def latency(bench: Bench, shape: str, batch: int) -> str:
    """The whole depth, dense against half of heads and neurons gone."""
    options = {"batch": batch, "prompt": 16 if bench.small else 512, "repeats": 3}
    ask = evals.build({"name": "latency", "new_tokens": 2 if bench.small else 16, **options})
    memory = evals.build({"name": "memory", "batch": batch})
    model = bench.model(shape)
    dense = ask(model, None) | memory(model, None)
    MAGNITUDE.prune(model, bench.tokens())
    after = ask(model, None) | memory(model, None)
    keys = {"prefill_ms": "prefill", "decode_ms_per_token": "decode, a token"}
    words = [f"{name} {dense[k]:.2f} -> {after[k]:.2f} ms" for k, name in keys.items()]
    words += [f"loaded {dense['loaded_memory_mib']:,.0f} -> {after['loaded_memory_mib']:,.0f} MiB"]
    words += [f"peak {dense['peak_memory_mib']:,.0f} -> {after['peak_memory_mib']:,.0f} MiB"]
    return ", ".join(words)


def saved(bench: Bench) -> str:
    """A checkpoint written from the device, loaded onto it again: the same logits."""
    _, pruned = pruned_shape(bench)
    tokens = bench.tokens(2)
    expected = forward(pruned.model, tokens)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        checkpoint.save(
            pruned.model, byte_tokenizer(), path, kept=pruned.kept, groups=pruned.groups
        )
        again, _ = checkpoint.load(path, device=str(bench.device))
    gap = relative(expected, forward(again, tokens))
    note = f"{type(again).__name__}, logits differ by {gap:.0e}"
    if gap > 1e-6:
        raise Disagree(note)
    return note


def streamed(method: Method, weights: str, bench: Bench) -> str:
    """`model.weights=host` or `disk`: what is chosen where blocks come to the device in turn, and
    the most of the device that it takes.
    """
    there = bench.model("1.1B")
    whole = sum(p.numel() * p.element_size() for p in there.parameters()) / 2**20
    away = copy.deepcopy(there).to("cpu")
    expected = method.prune(there, bench.tokens())
    logits = forward(there, bench.tokens(1)).cpu()
    del there
    if weights == "disk":
        map_weights(away)
    stream(away, bench.device)
    on_cuda = bench.device.type == "cuda"
    if on_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(bench.device)
        standing = torch.cuda.memory_allocated(bench.device)
    start = time.perf_counter()
    found = method.prune(away, bench.tokens())
    wait(bench.device)
    seconds = time.perf_counter() - start
    most = torch.cuda.max_memory_allocated(bench.device) - standing if on_cuda else 0
    share, units = agreement(expected, found)
    gap = relative(logits, forward(away, bench.tokens(1)).cpu())
    note = f"{method.name}: {share:.2%} of {units:,} units, logits {gap:.0e}, {seconds:.1f} s, "
    note += f"{most / 2**20:,.0f} MiB of the device for {whole:,.0f} MiB of weights"
    if share < AGREES or gap > 0.05:
        raise Disagree(note)
    return note


def twice(bench: Bench) -> str:
    """The same seed chooses the same units again."""
    method = Method({"name": "oneshot"}, {"name": "taylor"}, UNITS)
    first, second = (pruned_shape(bench, method)[1] for _ in range(2))
    share, units = agreement(first, second)
    if share < 1:
        raise Disagree(f"{share:.2%} of {units:,} units")
    return f"all of {units:,} units"


def discovered(arch: str, bench: Bench) -> str:
    """What goes together in a model on the device is what goes together in it on the CPU."""
    model = tiny_model(arch)
    expected = _facts(graph.discover(model))
    there = model.to(bench.device)
    groups = graph.discover(there)
    if _facts(groups) != expected:
        raise Disagree(f"{len(groups)} groups, {len(expected)} on the CPU, not all the same")
    method = Method({"name": "oneshot", "kinds": [groups[0].kind]}, {"name": "taylor"}, UNITS)
    pruned = method.prune(there, torch.randint(8, 100, (8, 24)))
    relative(forward(pruned.model, torch.arange(8, 40)[None]), torch.zeros(()).to(bench.device))
    return f"{len(groups)} groups, pruned by Taylor"


def _facts(groups: list[Group]) -> list[Any]:
    return [
        (g.name, g.kind, g.units, [(m.param, m.axis, m.index.tolist()) for m in g.members])
        for g in groups
    ]


def whole_run(bench: Bench) -> str:
    """`prunekit model=tiny_llama` by the runner: checked, pruned, measured, recovered, saved."""
    with tempfile.TemporaryDirectory() as folder:
        found = _run(bench, folder)
    key = next(k for k in found if k.startswith("pruned/ppl") and not k.endswith("stderr"))
    return f"{key} {found[key]:.1f}"


BY_ELEMENTS = ("pruner=unstructured", "criterion=wanda", "ratio.target=0.5", "ratio.of=prunable")


def repeated(bench: Bench, *more: str) -> str:
    """The same run with `deterministic=true` comes to the same bits again."""
    weights = []
    for _ in range(2):
        with tempfile.TemporaryDirectory() as folder:
            _run(bench, folder, "deterministic=true", *more)
            (file,) = Path(folder).glob("checkpoint/*.safetensors")
            weights.append(file.read_bytes())
    if weights[0] != weights[1]:
        raise Disagree("the two checkpoints differ")
    return f"{len(weights[0]):,} bytes, the same"


def _run(bench: Bench, folder: str, *more: str) -> dict[str, float]:
    from prunekit.cli.compose import composed
    from prunekit.runner.run import run

    words = ["model=tiny_llama", f"model.device={bench.device}", "calib.samples=4"]
    words += ["calib.length=16", "exclude=none", "track=silent", "eval=quick", "cache=false"]
    words += ["recovery=none"]
    found: dict[str, float] = run(next(composed([*words, *more, f"out={folder}"])), folder)[
        "results"
    ]
    return found


def real(method: Method, bench: Bench) -> str:
    """The real model in bfloat16 on its own text: perplexity dense and pruned."""
    model, tokenizer = real_model(bench, "fast")
    measure = evals.build({"name": "perplexity", "limit": 4 if bench.small else 64, "batch": 16})
    before = measure(model, tokenizer)["ppl_pydocs_128"]
    method.prune(model, real_tokens(bench, tokenizer))
    after = measure(model, tokenizer)["ppl_pydocs_128"]
    return f"pydocs perplexity {before:.2f} -> {after:.2f}"


def real_agrees(method: Method, bench: Bench) -> str:
    """The real model in float32, on the CPU and on the device."""
    on_cpu, tokenizer = real_model(Bench(torch.device("cpu"), real=bench.real), "float32")
    there = copy.deepcopy(on_cpu).to(bench.device)
    tokens = real_tokens(bench, tokenizer, 4)
    share, units = agreement(method.prune(on_cpu, tokens), method.prune(there, tokens))
    gap = relative(forward(on_cpu, tokens[:1]), forward(there, tokens[:1]).cpu())
    note = f"{share:.3%} of {units:,} units, logits {gap:.0e}"
    if share < AGREES:
        raise Disagree(note)
    return note


def real_model(bench: Bench, dtype: str) -> tuple[nn.Module, Any]:
    """SmolLM2 or whatever model the path holds."""
    from prunekit.registry import models

    node = {"name": "hf", "path": bench.real} if bench.real else {"name": "smollm2_135m"}
    model, tokenizer = models.build(node | {"dtype": dtype, "device": str(bench.device)})()
    return model, tokenizer


def real_tokens(bench: Bench, tokenizer: Any, samples: int = 16) -> Tensor:
    """(N, T) of the real model's own calibration text."""
    from prunekit.registry import calibs

    length = 16 if bench.small else 128
    tokens: Tensor = calibs.build({"name": "crop", "samples": samples, "length": length})(tokenizer)
    return tokens
