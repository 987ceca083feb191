"""Perplexity on several kinds of text at once, and its mean over those that calibration never
saw.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from prunekit.architecture.modes import eval_mode
from prunekit.data.files import DataRoot
from prunekit.data.kept_prompt import prompt_ids
from prunekit.errors import ConfigError
from prunekit.evals.named_texts import EvaluationText, Texts, check_seen, windows_of
from prunekit.evals.windows import exponentiated, window_nll
from prunekit.registry import Component, Length, Positive, evals


def check_texts(
    calib: Component, *, texts: dict[str, EvaluationText], seen: list[str], **_: Any
) -> None:
    """Raises ConfigError as `check_seen` does, and where all texts are seen."""
    check_seen("domains", calib, texts, seen)
    if not set(texts) - set(seen):
        raise ConfigError("eval=domains: all texts are seen, so there is none to average over")


@evals.register(relative="ppl_unseen", check=check_texts, context=("window",))
def domains(
    model: nn.Module,
    tokenizer: Any,
    *,
    texts: Texts,
    seen: list[str] = [],  # noqa: B006 (never mutated; the YAML states it)
    window: Length = 1024,
    limit: Positive = 8,
    batch: Positive = 4,
    bos: bool = False,
    data_root: DataRoot = None,
) -> dict[str, float]:
    """Perplexity of several named texts, `ppl_<name>_<window>`, and `ppl_unseen_<window>`, the
    geometric mean over those of another kind than the calibration text.

    Divided by the dense model's, that mean is the geometric mean of the texts' own ratios; the
    runner reports it as `ppl_unseen_<window>_to_dense`.

    Args:
        texts: name -> a data set and its split, or a path.
        seen: names of those whose kind was calibrated on: reported, and left out of the mean.
        window: tokens.
        limit: windows of each text, at even distances over it.
        batch: windows at a time.
        bos: one BOS in front of each text.

    Raises ConfigError where a text is not there or shorter than a window.
    """
    found, logs = {}, []
    for name, source in texts.items():
        windows = windows_of(
            source, tokenizer, window=window, limit=limit, bos=bos, data_root=data_root
        )
        with eval_mode(model):
            losses = window_nll(model, windows, batch, name, prompt_ids(model, tokenizer))
        nll = float(losses.mean())
        found[f"ppl_{name}_{window}"] = exponentiated(nll)
        if name not in seen:
            logs.append(nll)
    return found | {f"ppl_unseen_{window}": exponentiated(sum(logs) / len(logs))}
