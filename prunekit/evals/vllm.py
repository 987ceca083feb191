"""Tokens a second in vLLM, the dense model beside the pruned one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import nn

from prunekit.checkpoint import save
from prunekit.evals.engine_speed import measured
from prunekit.export.engine_process import interpreter
from prunekit.export.nemotron_nas import export_nemotron_nas
from prunekit.registry import Component, Natural, Positive, evals
from prunekit.types import Dense


def check_vllm(calib: Component, **_: Any) -> None:
    """Raises ConfigError where there is no vLLM."""
    interpreter("vLLM")


@evals.register(needs="dense", cached=False, check=check_vllm, context=("prompt", "new_tokens"))
def vllm(
    model: nn.Module,
    tokenizer: Any,
    dense: Dense,
    *,
    form: Literal["checkpoint", "nemotron-nas"] = "checkpoint",
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto",
    batch: Positive = 1,
    prompt: Positive = 256,
    new_tokens: Positive = 64,
    repeats: Positive = 5,
    warmup: Natural = 1,
    share: Annotated[float, Field(gt=0, lt=0.5)] = 0.4,
    compiled: bool = True,
) -> dict[str, float]:
    """Tokens a second in vLLM, of prefill and of decode, of a pruned model beside the dense one, in
    turns in one process.

    Keys begin with `vllm_` and go on as those of eval=llamacpp. The dense model runs in the
    engine's own class, a pruned one there too where transformers' class can build it, else in the
    backend that runs transformers' modules.

    Args:
        form: `nemotron-nas` writes what is not the dense model as DeciLM block configs, which have
            a class of their own in the engine.
        dtype: of the weights in the engine; `auto` is the model's.
        batch: sequences side by side.
        prompt: tokens of each prompt.
        new_tokens: tokens written after the first, a pass for each.
        repeats: requests that are measured.
        warmup: requests before that go unmeasured.
        share: of the GPU's memory, for each of the two models.
        compiled: false runs modules as they are (the engine's enforce_eager).

    A model that the engine does not take is skipped with a warning that says why. Raises
    ConfigError where there is no vLLM: the package here, or an interpreter that has it in
    PRUNEKIT_VLLM.
    """
    request = {"prompt": prompt, "new_tokens": new_tokens, "repeats": repeats, "warmup": warmup}
    more = {"batch": batch, "dtype": dtype, "share": share, "compiled": compiled}

    def write(of: nn.Module, path: Path) -> Path:
        saved = save(of, tokenizer, path)
        if form == "checkpoint" or dense.itself or of is not model:
            return saved
        return export_nemotron_nas(saved, path.with_name("nemotron"))

    return measured(
        "vLLM", "time_vllm.py", model, dense, write=write, request=request | more, key="vllm"
    )
