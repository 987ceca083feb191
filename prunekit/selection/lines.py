"""Which rows and columns of matrices go, so that no more elements go than a number allows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Lines(NamedTuple):
    """Of a matrix: `rows (outputs,)` and `columns (inputs,)` bool, True = gone."""

    rows: Tensor
    columns: Tensor

    @property
    def kept(self) -> Tensor:
        """(outputs, inputs) bool: elements that stay."""
        return ~self.rows[:, None] & ~self.columns


def no_lines(outputs: int, inputs: int) -> Lines:
    """Those of a matrix that lost nothing."""
    return Lines(torch.zeros(outputs, dtype=torch.bool), torch.zeros(inputs, dtype=torch.bool))


def cheapest_lines(
    costs: Mapping[str, tuple[Tensor, Tensor]], gone: Mapping[str, Lines], count: int
) -> dict[str, Lines]:
    """`gone` and, of all matrices, the rows and columns with the lowest costs, up to the first one
    with which more than `count` elements would be gone. An element where a row and a column cross
    counts once; no matrix loses its last row or column.

    costs: by matrix, of its rows and of its columns; infinite where one may not go.
    """
    found = {name: Lines(lines.rows.clone(), lines.columns.clone()) for name, lines in gone.items()}
    left = {name: [int((~x).sum()) for x in lines] for name, lines in found.items()}
    total = sum(lines.rows.numel() * lines.columns.numel() for lines in found.values())
    total -= sum(rows * columns for rows, columns in left.values())
    for name, axis, index in _ascending(costs, gone):
        across = left[name][1 - axis]
        if left[name][axis] == 1:
            continue
        if total + across > count:
            break
        found[name][axis][index] = True
        left[name][axis] -= 1
        total += across
    return found


def _ascending(
    costs: Mapping[str, tuple[Tensor, Tensor]], gone: Mapping[str, Lines]
) -> list[tuple[str, int, int]]:
    """(matrix, axis, index) of what may still go, the cheapest first."""
    places, values = [], []
    for name, axes in costs.items():
        for axis, cost in enumerate(axes):
            free = (cost.isfinite() & ~gone[name][axis]).nonzero()[:, 0]
            places += [(name, axis, i) for i in free.tolist()]
            values.append(cost[free])
    order = torch.cat(values).argsort(stable=True).tolist()
    return [places[i] for i in order]
