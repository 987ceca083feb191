"""What can be said of an answer without a judge: how much it repeats itself, what it has in common
with another one, whether it names what was asked for, whether it declines.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

DECLINING = re.compile(
    r"\b(?:i(?:'m| am) (?:very |so |really )?(?:sorry|unable|not able|not comfortable)"
    r"|i apologi[sz]e|i (?:can(?:'t|not| not)|could(?: not|n't)|won't|will not|must decline|refuse)"
    r"|(?:it is|it's|that is|that's) not (?:appropriate|ethical|legal|right|okay|ok))\b",
    re.I,
)
OPENING = 200
"""Characters in which an answer that declines says so."""


def distinct(tokens: Sequence[int], n: int) -> float:
    """Share of the n-grams that are different ones (Li et al., arXiv 1510.03055); 0 where the
    answer has none.
    """
    grams = list(zip(*(tokens[i:] for i in range(n))))
    return len(set(grams)) / len(grams) if grams else 0.0


def longest_loop(tokens: Sequence[int]) -> int:
    """Tokens of the longest stretch that is one sequence said twice or more in immediate
    succession.
    """
    longest = 0
    for period in range(1, len(tokens) // 2 + 1):
        run = 0
        for i in range(period, len(tokens)):
            run = run + 1 if tokens[i] == tokens[i - period] else 0
            if run >= period:
                longest = max(longest, run + period)
    return longest


def words(text: str) -> list[str]:
    """Words without case and punctuation."""
    return re.findall(r"\w+", text.casefold())


def token_f1(answer: str, reference: str) -> float:
    """F1 of the words in common, each as often as in both (SQuAD); two empty texts are the same."""
    ours, theirs = words(answer), words(reference)
    return _f1((Counter(ours) & Counter(theirs)).total(), len(ours), len(theirs))


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004); two empty texts are the same."""
    ours, theirs = words(answer), words(reference)
    row = [0] * (len(theirs) + 1)
    for word in ours:
        before = row
        row = [0]
        for j, other in enumerate(theirs):
            row.append(before[j] + 1 if word == other else max(before[j + 1], row[j]))
    return _f1(row[-1], len(ours), len(theirs))


def _f1(common: int, ours: int, theirs: int) -> float:
    return 2 * common / (ours + theirs) if ours + theirs else 1.0


def names_one(answer: str, aliases: Sequence[str]) -> bool:
    """Whether one of the aliases is in the answer, without case and spaces, as LLM-KICK looks for
    them (arXiv 2310.01382), but between the ends of words: its `Au` is in every `because`.
    """
    said = answer.casefold()
    return any(_pattern(alias).search(said) for alias in aliases if alias.strip())


def _pattern(alias: str) -> re.Pattern[str]:
    letters = map(re.escape, "".join(alias.casefold().split()))
    return re.compile(r"(?<!\w)" + r"\s*".join(letters) + r"(?!\w)")


def declines(answer: str) -> bool:
    """Whether the beginning of an answer says that it will not do what was asked for."""
    return DECLINING.search(answer[:OPENING].replace("’", "'")) is not None
