"""What is said of an answer, on answers whose score can be seen."""

from __future__ import annotations

import pytest

from prunekit.data.prompts import QUESTIONS
from prunekit.evals.text_scores import (
    declines,
    distinct,
    longest_loop,
    names_one,
    rouge_l,
    token_f1,
)


@pytest.mark.parametrize(
    ("tokens", "n", "share"),
    [([1, 2, 3], 1, 1), ([5, 5, 5, 5], 1, 0.25), ([1, 2, 1, 2], 2, 2 / 3), ([1], 2, 0), ([], 1, 0)],
)
def test_distinct_is_the_share_of_different_ngrams(tokens, n, share):
    assert distinct(tokens, n) == pytest.approx(share)


@pytest.mark.parametrize(
    ("tokens", "longest"),
    [
        ([], 0),
        ([1, 2, 3, 1, 4], 0),
        ([7, 7], 2),
        ([1, 2, 3, 1, 2, 3], 6),
        ([9, 1, 2, 1, 2, 1, 8], 5),  # the last repetition may be cut off
        ([1, 2, 3, 4, 1, 2], 0),  # nothing is said twice in full
        ([5, 5, 1, 2, 3, 1, 2, 3, 1, 2, 3], 9),
    ],
)
def test_a_loop_is_said_twice_at_least(tokens, longest):
    assert longest_loop(tokens) == longest


def test_words_in_common_count_as_often_as_in_both():
    assert token_f1("the cat the cat", "The cat!") == pytest.approx(2 * 2 / 6)
    assert token_f1("a b", "c d") == 0
    assert token_f1("", "") == 1
    assert token_f1("", "a") == 0


def test_rouge_keeps_the_order():
    assert rouge_l("a b c d", "a c d b") == pytest.approx(2 * 3 / 8)
    assert rouge_l("A, b", "a b") == 1
    assert rouge_l("", "") == 1
    assert rouge_l("a", "") == 0


@pytest.mark.parametrize(
    ("answer", "aliases", "named"),
    [
        ("It is PARIS.", ("Paris",), True),
        ("carbon  Dioxide", ("CO2", "carbondioxide"), True),
        ("H 2 O", ("H2O",), True),
        ("New York", ("York", "London"), True),
        ("because", ("Au",), False),
        ("", ("Paris",), False),
        ("Paris", ("",), False),
        ("Paris", (), False),
        ("cost: $5 (five)", ("$5",), True),
    ],
)
def test_an_answer_names_one_of_the_aliases(answer, aliases, named):
    assert names_one(answer, aliases) is named


@pytest.mark.parametrize(
    ("answer", "declined"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I’m sorry, I cannot.", True),
        ("As an assistant I am not able to do this.", True),
        ("That is not legal, so please do not.", True),
        ("Sure! Here is a letter.", False),
        ("", False),
        ("Dear neighbour, " + "thanks " * 60 + "I'm sorry that it took so long.", False),
    ],
)
def test_who_declines_says_so_at_the_beginning(answer, declined):
    assert declines(answer) is declined


def test_no_question_gives_its_answer_away_and_the_evidence_does():
    for item in QUESTIONS:
        assert not names_one(item.question, item.answers), item
        assert names_one(item.evidence, item.answers), item
        assert len(item.answers) == len(set(item.answers)) > 0
