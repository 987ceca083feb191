"""Prose out of Python's own reference, which every interpreter carries: text without a download."""

from __future__ import annotations

import re

TEST = (
    "compound",
    "formatstrings",
    "execmodel",
    "import",
    "dict",
    "context-managers",
    "sequence-types",
)
CALIBRATION = (
    "string-methods",
    "typesmapping",
    "assignment",
    "comparisons",
    "strings",
    "objects",
    "numeric-types",
)
"""Topics of each part by name, so that a patch release of Python that adds or edits a topic moves
no other; recovery has the rest.
"""
SPLITS = ("calibration", "recovery", "test")


def _prose(text: str) -> list[str]:
    """Paragraphs of plain English, one line each: no code, grammar, headings, or notes on versions,
    which patch releases change.
    """
    found = []
    for block in re.split(r"\n\s*\n", text):
        words = block.split()
        line = " ".join(words)
        letters = sum(c.isalpha() or c == " " for c in line)
        if (
            len(words) < 8
            or line[-1] not in ".:;)"
            or letters < 0.8 * len(line)
            or ">>>" in line
            or "::=" in line
        ):
            continue
        if not re.search(r"(Changed|New|Added|Removed|Deprecated since) (in )?version", line):
            found.append(line)
    return found


def paragraphs(split: str) -> list[str]:
    """Paragraphs of one part of the reference, one of `SPLITS`.

    Topics quote each other: a paragraph belongs to the first part that has it.
    """
    from pydoc_data.topics import topics

    named = TEST + CALIBRATION
    parts = {
        "test": TEST,
        "calibration": CALIBRATION,
        "recovery": tuple(t for t in sorted(topics) if t not in named),
    }
    owner: dict[str, str] = {}
    for part, names in parts.items():
        for name in names:
            for paragraph in _prose(topics.get(name, "")):
                owner.setdefault(paragraph, part)
    return [paragraph for paragraph, part in owner.items() if part == split]
