"""Rows and columns of matrices: the cheapest, counted once where they cross, never the last."""

from __future__ import annotations

import torch

from prunekit.selection.lines import cheapest_lines, no_lines


def costs(rows, columns):
    return torch.tensor(rows, dtype=torch.double), torch.tensor(columns, dtype=torch.double)


def test_the_cheapest_go_up_to_the_first_that_does_not_fit():
    found = {"a": costs([5, 1, 9], [2, 7, 8, 6]), "b": costs([3, 10], [4, 11])}
    gone = {"a": no_lines(3, 4), "b": no_lines(2, 2)}
    # a's row 1 (4 elements), a's column 0 (2 of it are left), b's row 0 (2), b's column 0 (1)
    for count, rows, columns, b in ((8, [1], [0], [0]), (7, [1], [0], []), (5, [1], [], [])):
        lines = cheapest_lines(found, gone, count)
        assert lines["a"].rows.nonzero()[:, 0].tolist() == rows
        assert lines["a"].columns.nonzero()[:, 0].tolist() == columns
        assert lines["b"].rows.nonzero()[:, 0].tolist() == b
    assert int((~cheapest_lines(found, gone, 9)["b"].kept).sum()) == 3
    assert not any(x.any() for lines in gone.values() for x in lines)


def test_a_matrix_keeps_a_row_and_a_column():
    lines = cheapest_lines({"a": costs([1, 2], [3, 4])}, {"a": no_lines(2, 2)}, 4)["a"]
    assert lines.kept.tolist() == [[False, False], [False, True]]


def test_what_went_before_stays_gone_and_infinite_costs_stay():
    gone = {"a": no_lines(3, 3)}
    gone["a"].rows[2] = True
    found = {"a": costs([2, 1, 0], [float("inf")] * 3)}
    lines = cheapest_lines(found, gone, 6)["a"]
    assert lines.rows.tolist() == [False, True, True]
    assert not lines.columns.any()
