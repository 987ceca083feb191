"""What a result says beside the numbers that evals give."""

from __future__ import annotations

from prunekit.runner.results import to_dense


def test_numbers_are_divided_by_those_of_the_dense_model_that_are_known():
    numbers = {"ppl_a_32": 6.0, "ppl_b_32": 8.0, "kl_a_32": 0.1}
    known = {"dense/ppl_a_32": 4.0}
    assert to_dense("pruned", numbers, known, "ppl_") == {"pruned/ppl_a_32_to_dense": 1.5}


def test_a_checkpoint_that_is_measured_alone_is_divided_by_nothing():
    assert to_dense("pruned", {"ppl_a_32": 6.0}, {}, "ppl_") == {}


def test_errors_are_divided_by_nothing_even_where_the_dense_one_is_zero():
    numbers = {"ppl_a_32": 6.0, "ppl_a_32_stderr": 0.5}
    known = {"dense/ppl_a_32": 4.0, "dense/ppl_a_32_stderr": 0.0}
    assert to_dense("pruned", numbers, known, "ppl_") == {"pruned/ppl_a_32_to_dense": 1.5}
