"""How far a pruned model's next-token distributions are from the dense model's, on text of the kind
that was calibrated on and of other kinds.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.activations.condensed import measure
from prunekit.architecture.modes import eval_mode
from prunekit.data.files import DataRoot
from prunekit.data.kept_prompt import prompt_ids
from prunekit.errors import ConfigError
from prunekit.evals.named_texts import EvaluationText, Texts, check_seen, windows_of
from prunekit.evals.windows import exponentiated
from prunekit.registry import Component, Length, Positive, evals
from prunekit.types import Dense

SIDES = ("in", "out")


def check_divergence(
    calib: Component, *, texts: dict[str, EvaluationText], seen: list[str], **_: Any
) -> None:
    """Raises ConfigError as `check_seen` does, and for a text called as a mean is."""
    check_seen("divergence", calib, texts, seen)
    for name in SIDES:
        if name in texts:
            raise ConfigError(f"eval=divergence: a text cannot be called {name!r}, as a mean is")


@evals.register(needs="dense", relative="ppl_", check=check_divergence, context=("window",))
def divergence(
    model: nn.Module,
    tokenizer: Any,
    dense: Dense,
    *,
    texts: Texts,
    seen: list[str] = [],  # noqa: B006  (read only)
    window: Length = 1024,
    limit: Positive = 8,
    batch: Positive = 1,
    bos: bool = False,
    top: Positive = 256,
    data_root: DataRoot = None,
) -> dict[str, float]:
    """KL from the dense model, agreement on the most likely token, expected acceptance of its
    drafts, and perplexity, by text and over the seen (`in`) and the unseen (`out`) ones.

    Keys end in `_<text>_<window>`: `kl` (nats a token, a lower bound), `kl_gap` (at most so much is
    missing from it), `top1`, `acceptance` (sum of min(p, q), an upper bound) and `acceptance_gap`,
    `ppl`. `kl` and `ppl` have a `_stderr`, over windows. Over several texts `ppl` is the geometric
    mean, the others the mean. A prompt that a pruner left with the model stands before each window.

    Args:
        texts: name -> a data set and its split, or a path.
        seen: names of those of the calibration text's kind.
        window: tokens.
        limit: windows of each text, at even distances over it.
        batch: windows at a time.
        bos: one BOS in front of each text.
        top: tokens whose probability under the dense model is kept for each position; of the others
            the sum is.

    Raises ConfigError where a text is not there or shorter than a window.
    """
    found: dict[str, float] = {}
    by_text = {}
    for name, source in texts.items():
        windows = windows_of(
            source, tokenizer, window=window, limit=limit, bos=bos, data_root=data_root
        )
        means = compared(model, dense, windows, tokenizer, batch=batch, top=top, name=name)
        by_text[name] = means
        found |= numbers({name: means}, f"{name}_{window}")
    for side in SIDES:
        chosen = {n: m for n, m in by_text.items() if (n in seen) == (side == "in")}
        if chosen:
            found |= numbers(chosen, f"{side}_{window}")
    return found


def compared(
    model: nn.Module,
    dense: Dense,
    windows: Tensor,
    tokenizer: Any,
    *,
    batch: int,
    top: int,
    name: str,
) -> dict[str, Tensor]:
    """Means by window `(N,)` of `condensed.measure`. One pass over the text, for the dense model
    too: what is kept of it is taken on the way.
    """
    own: list[dict[str, Tensor]] = []
    how: dict[str, Any] = {"batch": batch, "top": top}

    def condensed(of: nn.Module) -> dict[str, Tensor]:
        prompt = prompt_ids(of, tokenizer)
        with eval_mode(of):
            reference, means = measure(of, windows, name=f"dense {name}", prompt=prompt, **how)
        own.append(means)
        return reference

    reference = dense.remember(name, condensed)
    if dense.itself and own:
        return own[0]
    how |= {"reference": reference, "prompt": prompt_ids(model, tokenizer)}
    with eval_mode(model):
        return measure(model, windows, name=name, **how)[1]


def numbers(by_text: dict[str, dict[str, Tensor]], ending: str) -> dict[str, float]:
    """The means over texts, under keys with this ending; errors where there is one text alone."""
    texts = list(by_text.values())

    def mean(key: str) -> float:
        return float(torch.stack([t[key].mean() for t in texts]).mean())

    keys = ("kl", "kl_gap", "top1", "acceptance", "acceptance_gap")
    found = {f"{key}_{ending}": mean(key) for key in keys}
    value = exponentiated(mean("nll"))
    found[f"ppl_{ending}"] = value
    if len(texts) == 1 and len(texts[0]["nll"]) > 1:
        root = math.sqrt(len(texts[0]["nll"]))
        found[f"kl_{ending}_stderr"] = float(texts[0]["kl"].std()) / root
        found[f"ppl_{ending}_stderr"] = value * float(texts[0]["nll"].std()) / root
    return found
