"""Pruning times quantisation: size, perplexity and tokens a second in llama.cpp of a checkpoint and
of the dense model that it was made of, each as it is, by torchao and in GGUF's types.

    PRUNEKIT_LLAMACPP=.../python PYTHONPATH=. python benchmarks/quantise.py CHECKPOINT \
        --text wikitext2_tokenised/test.txt

Prints a table. torchao's rows are perplexity of weights alone quantised (int4: groups of 32; its
packed form has no kernel for the CPU, so the size counts 4 bits a weight and what a group adds).
Perplexity of GGUF rows is transformers' with the weights as the file rounds them. Speed is
llama.cpp's own clock, one thread, all files in turns; medians.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from prunekit.checkpoint import load
from prunekit.export.engine_process import ask
from prunekit.export.gguf import write_gguf
from prunekit.export.gguf_file import coding_of
from prunekit.export.k_quants import engine_quantiser
from prunekit.registry import evals
from prunekit.runner.again import dense_model

TYPES = ("f16", "q8_0", "q4_k")


def by_torchao(model: nn.Module, bits: int) -> tuple[nn.Module, float]:
    """A copy with the linear modules of its blocks quantised, and its MiB."""
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    model = copy.deepcopy(model)
    weights = [p for n, p in model.model.layers.named_parameters() if p.dim() == 2]
    rest = sum(p.numel() for p in model.parameters()) - sum(w.numel() for w in weights)
    if bits == 8:
        config: Any = Int8WeightOnlyConfig()
        size = sum(w.numel() + 4 * w.shape[0] for w in weights)
    else:
        config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
        size = sum(w.numel() / 2 + 2 * w.numel() / 32 for w in weights)
    quantize_(model.model.layers, config, filter_fn=suits if bits == 4 else None)
    return model, (size + 2 * rest) / 2**20


def suits(module: nn.Module, path: str) -> bool:
    """Whether groups of 32 fit into a linear module's rows."""
    return isinstance(module, nn.Linear) and module.in_features % 32 == 0


def as_written(model: nn.Module, type: str) -> nn.Module:
    """A copy with its matrices rounded as a GGUF file of this type has them; the order of rows,
    which export changes, has no part in it.
    """
    from gguf.quants import dequantize, quantize

    model, engine = copy.deepcopy(model), engine_quantiser()
    with torch.no_grad():
        for name, p in model.named_parameters():
            called = "token_embd.weight" if "embed_tokens" in name else name
            coding = coding_of(called, tuple(p.shape), type)
            by = quantize if type == "f16" or coding.name in ("F16", "F32") else engine
            made = dequantize(by(p.float().numpy(), coding), coding)
            p.copy_(torch.from_numpy(made.copy()).reshape(p.shape))
    return model


def speeds(files: list[Path], given: argparse.Namespace) -> list[tuple[float, float]]:
    """Tokens a second of prefill and decode."""
    request = {"prompt": given.prompt, "new_tokens": given.new_tokens, "repeats": given.repeats}
    more = {"paths": [str(f) for f in files], "warmup": 1, "threads": 1}
    (answer,) = ask("llama.cpp", "time_llamacpp.py", [request | more])
    if "error" in answer:
        raise SystemExit(answer["error"])
    prompt, new = given.prompt, given.new_tokens
    return [
        (median(prompt / t[0] for t in times), median(new / t[1] for t in times))
        for times in answer["times"]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", help="a text file for perplexity (default: Python's own docs)")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    text = {"path": given.text, "label": "text", "block": given.window, "every": 5}
    node = {"name": "perplexity", "window": given.window, "limit": given.windows, "bos": False}
    perplexity = evals.build(node | text if given.text else node)
    pruned, tokenizer = load(given.checkpoint)
    models = {"dense": dense_model(given.checkpoint)()[0], "pruned": pruned}

    def ppl(model: nn.Module) -> float:
        found = perplexity(model, tokenizer)
        return next(v for k, v in found.items() if not k.endswith("stderr"))

    rows, files = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models.items():
            model = model.float().eval()
            mib = sum(p.numel() for p in model.parameters()) * 2 / 2**20
            rows.append([name, "16 bits", mib, ppl(model)])
            for bits in (8, 4):
                made, mib = by_torchao(model, bits)
                rows.append([name, f"torchao int{bits}", mib, ppl(made)])
            for type in TYPES:
                file = write_gguf(model, tokenizer, Path(folder) / f"{name}-{type}.gguf", type=type)
                mib = file.stat().st_size / 2**20
                rows.append([name, f"GGUF {type}", mib, ppl(as_written(model, type))])
                files.append(file)
                print(rows[-1], flush=True)
        measured = iter(speeds(files, given))
    print("| model | weights | MiB | perplexity | prefill tokens/s | decode tokens/s |")
    print("|---|---|---|---|---|---|")
    for name, how, mib, value in rows:
        fast = next(measured) if how.startswith("GGUF") else None
        cells = "- | -" if fast is None else f"{fast[0]:.0f} | {fast[1]:.1f}"
        print(f"| {name} | {how} | {mib:.0f} | {value:.2f} | {cells} |")


if __name__ == "__main__":
    main()
