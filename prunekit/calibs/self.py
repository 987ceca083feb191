"""Text that the dense model writes itself: calibration without data (arXiv 2410.17170; the random
first token is LLM-QAT's, arXiv 2305.17888).
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from prunekit.data.generation import generate_rows
from prunekit.registry import Length, Positive, Seed, calibs

Temperature = Annotated[float, Field(gt=0)]


@calibs.register(name="self", needs="model", context=("length",))
def self_generated(
    tokenizer: Any,
    model: nn.Module,
    *,
    samples: Positive = 64,
    length: Length = 512,
    seed: Seed = 42,
    temperature: Temperature = 1.0,
    batch: Positive = 32,
) -> Tensor:
    """Samples of the model's own distribution: one random token of the vocabulary, and what the
    model says after it.

    Special tokens are neither drawn nor said, so that a sample is one stretch of text.

    Args:
        samples: N.
        length: T, tokens of a sample, the random one included; two at least.
        seed: of the sample's own generator.
        temperature: the logits are divided by it.
        batch: samples written at a time.

    Returns `(N, T)` int64. Raises ConfigError for a model that cannot generate.
    """
    special = sorted(set(tokenizer.all_special_ids))
    plain = torch.tensor(sorted(set(tokenizer.get_vocab().values()) - set(special)))
    generator = torch.Generator().manual_seed(seed)
    first = plain[torch.randint(len(plain), (samples, 1), generator=generator)]
    return generate_rows(
        model, first, length, banned=special, temperature=temperature, seed=seed, batch=batch
    )
