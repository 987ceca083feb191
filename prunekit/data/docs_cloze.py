"""docs_cloze: a four-way multiple-choice task out of pydocs' test part, so that an accuracy can be
had without a download.

A stretch of a paragraph is the question; its own next words stand among the next words of three
stretches of other paragraphs.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Any

from prunekit.data.datasets import texts

CONTEXT, CONTINUATION, CHOICES = 12, 6, 4
"""Words of a question, words of each answer (all alike, so that length decides
nothing), answers.
"""


def _draw(*parts: str) -> str:
    """A number that depends on the words alone: edits of Python's text then change the items they
    touch and no other.
    """
    return sha256("\n".join(parts).encode()).hexdigest()


def items() -> list[dict[str, Any]]:
    """All questions, as good as shuffled: `context`, `choices` (each with a space in front) and
    `label`, the place of the true one.
    """
    pieces = []
    for paragraph in texts("pydocs", "test"):
        words = paragraph.split()
        for start in range(0, len(words) - CONTEXT - CONTINUATION + 1, CONTEXT + CONTINUATION):
            cut = start + CONTEXT
            pieces.append(
                (
                    paragraph,
                    " ".join(words[start:cut]),
                    " " + " ".join(words[cut : cut + CONTINUATION]),
                )
            )
    found = []
    for paragraph, context, answer in pieces:
        others = {a for p, _, a in pieces if p != paragraph and a != answer}
        choices = sorted(others, key=lambda a: _draw(context, a))[: CHOICES - 1]
        label = int(_draw(context), 16) % CHOICES
        found.append(
            {
                "context": context,
                "choices": [*choices[:label], answer, *choices[label:]],
                "label": label,
            }
        )
    return sorted(found, key=lambda item: _draw(item["context"], "order"))


def _dataset(**_: Any) -> dict[str, Any]:
    from datasets import Dataset

    return {"test": Dataset.from_list(items())}


def task() -> Any:
    """The lm-eval task."""
    from lm_eval.api.task import ConfigurableTask

    return ConfigurableTask(
        config={
            "task": "docs_cloze",
            "custom_dataset": _dataset,
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{context}}",
            "doc_to_choice": "choices",
            "doc_to_target": "label",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": 1.0},
        }
    )
