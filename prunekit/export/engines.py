"""Which engines take a model, and where not, the one constraint that is missing and what to ask for
instead.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from prunekit.architecture.blocks import block_modules
from prunekit.checkpoint.block_configs import LIKE_LLAMA
from prunekit.checkpoint.config_choice import bypassed, has_one_expert_width
from prunekit.checkpoint.layout import describe_runtime_modules
from prunekit.checkpoint.stock_config import stock_config
from prunekit.errors import ConfigError
from prunekit.export.gguf import content_of, words_of
from prunekit.export.nemotron_nas import nemotron_nas_content


class Engine(NamedTuple):
    """An engine, whether it takes the model, and how, or what is missing."""

    name: str
    takes: bool
    how: str
    override: str = ""


def engines(model: Any, tokenizer: Any = None) -> list[Engine]:
    """One row an engine, from shapes, config and tokenizer alone: the model may be on the meta
    device, with its buffers initialised.
    """
    stock = stock_config(model) is not None
    return [
        _transformers(stock),
        _vllm(model, stock),
        _llamacpp(model, tokenizer),
        *_block_configs(model, stock),
    ]


def _transformers(stock: bool) -> Engine:
    how = "from_pretrained" if stock else "from_pretrained(..., trust_remote_code=True)"
    return Engine("transformers", True, how)


def _vllm(model: Any, stock: bool) -> Engine:
    """The backend that runs transformers' modules; docs/serving.md has what was measured."""
    name = "vLLM"
    if stock:
        return Engine(name, True, "its own class, where it has one")
    gone = [half for layer in block_modules(model) for half in bypassed(layer) if "mlp" not in half]
    if gone:
        other = _as_nemotron_nas(name, model, "export --to nemotron-nas")
        missing = Engine(name, False, "a layer has no attention", "pruner.kinds=[heads,neurons]")
        return other if other.takes else missing
    kinds = {entry["kind"] for entry in describe_runtime_modules(model)} - {"bypass"}
    if kinds:
        return Engine(name, False, f"run-time modules ({', '.join(sorted(kinds))}) were not tried")
    widths = {
        tuple(p.shape[-2:]) for n, p in model.named_parameters() if n.endswith("experts.down_proj")
    }
    if len(widths) > 1 and has_one_expert_width(model.config.get_text_config()):
        return Engine(name, False, "experts have one width in all layers", "pruner.kinds=[heads]")
    return Engine(name, True, "--model-impl transformers --trust-remote-code")


def _llamacpp(model: Any, tokenizer: Any) -> Engine:
    def written() -> str:
        content = content_of(model)
        with tempfile.TemporaryDirectory() as folder:
            words_of(tokenizer, content, Path(folder) / "trial.gguf")
        return f"export --to gguf (architecture {content.arch})"

    return _asked("llama.cpp", written)


def _asked(name: str, how: Callable[[], str]) -> Engine:
    """What the form says, which raises ConfigError for a model that it cannot hold."""
    try:
        return Engine(name, True, how())
    except ConfigError as error:
        why, _, other = str(error).partition(" Possible: ")
        override = other.removeprefix("prune with ") if "=" in other else ""
        return Engine(name, False, why.rstrip("."), override)


def _as_nemotron_nas(name: str, model: Any, how: str) -> Engine:
    def written() -> str:
        nemotron_nas_content(model)
        return how

    return _asked(name, written)


def _block_configs(model: Any, stock: bool) -> list[Engine]:
    names = ("SGLang", "TensorRT-LLM", "mlx-lm")
    if stock:
        return [Engine(name, True, "its own class, where it has one") for name in names]
    if model.config.model_type not in LIKE_LLAMA:
        why = "the same sizes in every layer"
        return [Engine(name, False, why, "ratio.loadable=stock") for name in names]
    how = "export --to nemotron-nas (run in vLLM, not in this engine)"
    return [_as_nemotron_nas(name, model, how) for name in names]


def lines(found: list[Engine]) -> list[list[str]]:
    """Engine, yes or no, how or what is missing, the override that would meet it."""
    return [[e.name, "yes" if e.takes else "no", e.how, e.override] for e in found]
