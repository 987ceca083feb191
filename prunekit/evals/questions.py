"""Questions with one answer, without and with text that has it: what LLM-KICK asks of FreebaseQA
and TriviaQA (arXiv 2310.01382), on a small list of our own.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

from torch import nn

from prunekit.data.prompts import QUESTIONS
from prunekit.evals.answering import answered, as_prompts, as_texts, check_chat
from prunekit.evals.text_scores import names_one
from prunekit.registry import Positive, evals

OTHERS = 3
"""Sentences beside the one with the answer."""


@evals.register(context=("new_tokens",), tokenized=check_chat)
def questions(
    model: nn.Module,
    tokenizer: Any,
    *,
    chat: bool = True,
    new_tokens: Positive = 16,
    batch: Positive = 8,
    limit: Positive | None = None,
) -> dict[str, float]:
    """Share of questions whose greedy answer has the right words in its first line:
    `acc_questions_closed` by what the model knows, `acc_questions_open` with four sentences of
    which one has the answer; each with its `_stderr`.

    Args:
        chat: in the chat template; false is plain text.
        new_tokens: tokens of an answer at most.
        batch: questions at a time.
        limit: the first so many questions.

    Raises ConfigError for a model that cannot generate, and for chat=true without a chat template.
    """
    asked = QUESTIONS[:limit]
    closed = [f"Answer in a few words: {item.question}" for item in asked]
    opened = [f"{evidence(i)}\n\n{text}" for i, text in enumerate(closed)]
    if not chat:
        closed, opened = ([f"{text}\nAnswer:" for text in texts] for texts in (closed, opened))
    found: dict[str, float] = {}
    for name, texts in (("closed", closed), ("open", opened)):
        prompts = as_prompts(tokenizer, texts, chat)
        said, _ = answered(model, tokenizer, prompts, new_tokens=new_tokens, batch=batch)
        right = [
            names_one(answer.partition("\n")[0], item.answers)
            for answer, item in zip(as_texts(tokenizer, said), asked, strict=True)
        ]
        share = sum(right) / len(right)
        found[f"acc_questions_{name}"] = share
        if len(right) > 1:
            error = sqrt(share * (1 - share) / (len(right) - 1))
            found[f"acc_questions_{name}_stderr"] = error
    return found


def evidence(i: int) -> str:
    """The sentence with the answer of question `i` among those of other questions, at a place that
    differs by question.
    """
    others = [QUESTIONS[(i + 7 * k) % len(QUESTIONS)].evidence for k in range(1, OTHERS + 1)]
    place = i % (OTHERS + 1)
    return " ".join([*others[:place], QUESTIONS[i].evidence, *others[place:]])
