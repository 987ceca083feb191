"""A needle in a haystack of local text: a number that is said once, and asked for at the end."""

from __future__ import annotations

import random
from typing import Annotated, Any

import torch
from pydantic import AfterValidator
from torch import Tensor, nn

from prunekit.data.datasets import Dataset, evaluation_text
from prunekit.data.files import DataRoot, TextFile
from prunekit.errors import ConfigError
from prunekit.evals.answering import answered, as_texts
from prunekit.evals.text_scores import names_one
from prunekit.evals.windows import token_ids
from prunekit.registry import Length, Positive, Seed, evals

OWNERS = ("the gardener", "the pilot", "the baker", "the violinist", "the captain", "the painter")
NEW_TOKENS = 10
"""Of an answer: four digits and what may stand around them."""


def _depths(found: list[float]) -> list[float]:
    if not found or not all(0 <= d <= 1 for d in found):
        raise ValueError("depths are shares of the text from 0, its beginning, to 1")
    return found


Depths = Annotated[list[float], AfterValidator(_depths)]


@evals.register(context=("length",))
def needle(
    model: nn.Module,
    tokenizer: Any,
    *,
    dataset: Dataset = "pydocs",
    split: str | None = None,
    path: TextFile | None = None,
    length: Length = 1024,
    depths: Depths = [0.1, 0.5, 0.9],  # noqa: B006  (read only)
    items: Positive = 6,
    batch: Positive = 1,
    seed: Seed = 0,
    data_root: DataRoot = None,
) -> dict[str, float]:
    """Share of needles that are found, `needle_<length>`, and at each depth,
    `needle_<length>_at<percent>`: the most likely continuation of "The number of the pilot is" has
    the four digits that the text says once.

    Args:
        dataset: the text around the needle; `path` names a file in its place.
        length: tokens of text, needle and question together.
        depths: where the needle is, as a share of the text before the question.
        items: needles of each depth, each in another stretch of the text.
        batch: prompts at a time.
        seed: of the numbers.

    Raises ConfigError for a text that is too short, and a model that cannot generate.
    """
    text = token_ids(evaluation_text(dataset, split, path, data_root), tokenizer, False)
    made = [
        haystack(text, tokenizer, length, depth, item, random.Random(f"{seed} {item}"))
        for depth in depths
        for item in range(items)
    ]
    prompts = [ids.tolist() for ids, _ in made]
    said, _ = answered(model, tokenizer, prompts, new_tokens=NEW_TOKENS, batch=batch)
    right = [
        names_one(answer, [number])
        for answer, (_, number) in zip(as_texts(tokenizer, said), made, strict=True)
    ]
    found = {f"needle_{length}": sum(right) / len(right)}
    for i, depth in enumerate(depths):
        share = sum(right[i * items : (i + 1) * items]) / items
        found[f"needle_{length}_at{round(100 * depth)}"] = share
    return found


def haystack(
    text: Tensor, tokenizer: Any, length: int, depth: float, item: int, draw: random.Random
) -> tuple[Tensor, str]:
    """A prompt `(length,)`, and the number that answers it. Raises ConfigError where needle and
    question leave no room for text, or the text does not fill it.
    """
    owner, number = OWNERS[item % len(OWNERS)], str(draw.randint(1000, 9999))
    hidden = token_ids(f"\n\nThe number of {owner} is {number}.\n\n", tokenizer, False)
    asked = token_ids(
        f"\n\nQuestion: What is the number of {owner}?\nAnswer: The number of {owner} is",
        tokenizer,
        False,
    )
    room = length - len(hidden) - len(asked)
    if room < 2 or len(text) < room:
        raise ConfigError(
            f"eval=needle: length={length} leaves {room} tokens around needle and question, and "
            f"the text has {len(text)}: at least 2 are needed, and as many as the text has"
        )
    start = item * room % (len(text) - room + 1)
    hay = text[start : start + room]
    at = round(depth * room)
    return torch.cat([hay[:at], hidden, hay[at:], asked]), number
