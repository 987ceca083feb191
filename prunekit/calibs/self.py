"""Text that the dense model writes itself: calibration without data (arXiv 2410.17170; the random
first token is LLM-QAT's, arXiv 2305.17888).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from prunekit.data.generation import Sampling, generate_chats, generate_text
from prunekit.registry import Above, Length, Positive, Seed, calibs


@calibs.register(name="self", needs="model", context=("length",))
def self_generated(
    tokenizer: Any,
    model: nn.Module,
    *,
    samples: Positive = 64,
    length: Length = 512,
    seed: Seed = 42,
    chat: bool = False,
    temperature: Above = 1.0,
    batch: Positive = 32,
) -> Tensor:
    """Samples of the model's own distribution: one random token of the vocabulary, and what the
    model says after it.

    Special tokens are neither drawn nor said (but for `chat`): a sample is one stretch of text.

    Args:
        samples: N.
        length: T, tokens of a sample, the random one included; two at least.
        seed: of the sample's own generator.
        chat: dialogues instead, from the chat template's opening on, the user's words too; special
            tokens may be said.
        temperature: the logits are divided by it.
        batch: samples written at a time.

    Returns `(N, T)` int64. Raises ConfigError for a model that cannot generate, and for
    chat=true where the tokenizer has no chat template.
    """
    write = generate_chats if chat else generate_text
    return write(model, tokenizer, samples, length, Sampling(temperature, seed, batch))
