"""Perplexity on several kinds of text at once, and its mean over those that calibration never
saw.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import AfterValidator, ConfigDict
from torch import Tensor, nn

from prunekit.data.datasets import Dataset, evaluation_text
from prunekit.data.files import DataRoot, TextFile
from prunekit.errors import ConfigError
from prunekit.evals import eval_mode
from prunekit.evals.texts_read import texts_read
from prunekit.evals.windows import cut, token_ids, window_nll
from prunekit.registry import Component, Length, Positive, evals


@dataclass(frozen=True)
class EvaluationText:
    """A data set, in the split that is kept for evaluation unless another is named, or a file."""

    __pydantic_config__: ClassVar[ConfigDict] = {"extra": "forbid"}

    dataset: Dataset | None = None
    split: str | None = None
    path: TextFile | None = None

    def __post_init__(self) -> None:
        if (self.dataset is None) == (self.path is None):
            raise ValueError("a text is either a dataset or a path")


def _several(texts: dict[str, EvaluationText]) -> dict[str, EvaluationText]:
    if not texts:
        raise ValueError("name a text at least: {ptb: {dataset: ptb}}")
    return texts


Texts = Annotated[dict[str, EvaluationText], AfterValidator(_several)]


def spread(windows: Tensor, limit: int) -> Tensor:
    """At most `limit` of the windows `(N, T)`, at even distances over the text."""
    if len(windows) <= limit:
        return windows
    return windows[torch.arange(limit) * len(windows) // limit]


def check_texts(
    calib: Component, *, texts: dict[str, EvaluationText], seen: list[str], **_: Any
) -> None:
    """Raises ConfigError for a name in `seen` that is no text, where all are seen, and where a text
    that counts as unseen is of a data set or file that `calib` reads.
    """
    unknown = [name for name in seen if name not in texts]
    if unknown:
        raise ConfigError(
            f"eval=domains: seen={', '.join(unknown)} is no text; there are: {', '.join(texts)}"
        )
    if not set(texts) - set(seen):
        raise ConfigError("eval=domains: all texts are seen, so there is none to average over")
    calibrated = texts_read(calib)
    for name, source in texts.items():
        if name not in seen and texts_read(source) & calibrated:
            raise ConfigError(
                f"eval=domains: {name} counts as unseen, but calib={calib.name} reads "
                f"{source.dataset or source.path} too; name it in seen, or calibrate on another "
                "text"
            )


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
        text = evaluation_text(source.dataset, source.split, source.path, data_root)
        ids = token_ids(text, tokenizer, bos)
        windows = spread(cut(ids, window, None, 1, None), limit)
        with eval_mode(model):
            nll = float(window_nll(model, windows, batch, name).mean())
        found[f"ppl_{name}_{window}"] = math.exp(nll)
        if name not in seen:
            logs.append(nll)
    return found | {f"ppl_unseen_{window}": math.exp(sum(logs) / len(logs))}
