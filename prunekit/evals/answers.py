"""What a model writes when it is asked for something: whether it goes in circles, comes to an end,
declines what it should, and says what the dense model says.
"""

from __future__ import annotations

from statistics import mean, stdev
from typing import Any

from torch import Tensor, nn

from prunekit.data.files import TextFile, read
from prunekit.data.prompts import REQUESTS, TO_DECLINE
from prunekit.evals.answering import answered, as_lists, as_prompts, as_texts, check_chat
from prunekit.evals.text_scores import declines, distinct, longest_loop, rouge_l, token_f1
from prunekit.registry import Above, Positive, Seed, evals
from prunekit.types import Dense


@evals.register(needs="dense", context=("new_tokens",), tokenized=check_chat)
def answers(
    model: nn.Module,
    tokenizer: Any,
    dense: Dense,
    *,
    path: TextFile | None = None,
    chat: bool = True,
    new_tokens: Positive = 64,
    temperature: Above = 1.0,
    batch: Positive = 8,
    limit: Positive | None = None,
    seed: Seed = 0,
) -> dict[str, float]:
    """Answers to requests, the most likely ones (`greedy`) and drawn ones (`sampled`): repetition,
    length, ends, and what the greedy ones have in common with the dense model's.

    Keys end in `_greedy` or `_sampled`, means over answers: `distinct1`, `distinct2` (share of
    different tokens and pairs), `unique_tokens`, `loop` (share of the answer in its longest loop),
    `length` (tokens), `stopped` (share that ended before `new_tokens`). Of greedy answers beside
    the dense model's: `f1`, `rouge_l` of words, both with a `_stderr`, and `same`, the share that
    is the same to the last token. `declined` is the share of greedy answers that decline what is to
    be declined, `declined_harmless` of the others; both are absent with a `path`.

    Args:
        path: .jsonl records with `text`, or a text whose lines are requests, in place of ours.
        chat: in the chat template; false is plain text.
        new_tokens: tokens of an answer at most.
        temperature: the logits of sampled answers are divided by it.
        batch: requests at a time.
        limit: the first so many requests.
        seed: of what is drawn.

    Raises ConfigError for a model that cannot generate, and for chat=true without a chat template.
    """
    asked = requests_of(path)[:limit]
    to_decline = [] if path else list(TO_DECLINE[:limit])
    prompts = as_prompts(tokenizer, asked + to_decline, chat)

    def greedy(of: nn.Module) -> dict[str, Tensor]:
        ids, stopped = answered(of, tokenizer, prompts, new_tokens=new_tokens, batch=batch)
        return {"ids": ids, "stopped": stopped}

    before = dense.remember("greedy", greedy)
    after = before if dense.itself else greedy(model)
    drawn = answered(
        model,
        tokenizer,
        prompts[: len(asked)],
        new_tokens=new_tokens,
        batch=batch,
        temperature=temperature,
        seed=seed,
    )
    n = len(asked)
    found = health(after["ids"][:n], after["stopped"][:n], "greedy") | health(*drawn, "sampled")
    texts = as_texts(tokenizer, after["ids"])
    found |= beside(texts[:n], as_texts(tokenizer, before["ids"])[:n])
    same = (after["ids"][:n] == before["ids"][:n]).all(1)
    found["same_greedy"] = float(same.double().mean())
    if to_decline:
        found["declined"] = mean(declines(text) for text in texts[n:])
        found["declined_harmless"] = mean(declines(text) for text in texts[:n])
    return found


def requests_of(path: str | None) -> list[str]:
    """Lines or records of a file that say anything, else ours."""
    if path is None:
        return list(REQUESTS)
    return [text for record in read(path) if (text := record["text"].strip())]


def health(ids: Tensor, stopped: Tensor, ending: str) -> dict[str, float]:
    """Means over answers `(N, T)` and whether they ended `(N,)`; an empty answer has no variety and
    no loop.
    """
    rows = as_lists(ids)
    found = {
        "distinct1": mean(distinct(row, 1) for row in rows),
        "distinct2": mean(distinct(row, 2) for row in rows),
        "unique_tokens": mean(len(set(row)) for row in rows),
        "loop": mean(longest_loop(row) / max(len(row), 1) for row in rows),
        "length": mean(len(row) for row in rows),
        "stopped": float(stopped.double().mean()),
    }
    return {f"{key}_{ending}": float(value) for key, value in found.items()}


def beside(texts: list[str], references: list[str]) -> dict[str, float]:
    """Words in common with the dense model's answers, with the error of the mean over requests."""
    found: dict[str, float] = {}
    for key, score in (("f1", token_f1), ("rouge_l", rouge_l)):
        values = [score(a, b) for a, b in zip(texts, references, strict=True)]
        found[f"{key}_greedy"] = mean(values)
        if len(values) > 1:
            found[f"{key}_greedy_stderr"] = stdev(values) / len(values) ** 0.5
    return found
