"""A budget of parameters goes where it costs least."""

from __future__ import annotations

import torch

from prunekit.selection.budget import cheapest, hull


def test_hull_keeps_the_corners_only():
    assert hull([0.0, 3.0, 4.0, 9.0]) == [0, 2, 3]
    assert hull([0.0, 1.0, 2.0, 4.0]) in ([0, 2, 3], [0, 1, 2, 3])


def test_budget_goes_where_it_costs_least():
    curves = {"a": torch.tensor([1.0, 2.0, 4.0, 9.0]), "b": torch.tensor([0.5, 10.0, 30.0, 40.0])}
    assert cheapest(curves, {"a": 10, "b": 10}, 40) == {"a": 3, "b": 1}
    assert cheapest(curves, {"a": 10, "b": 10}, 39) == {"a": 2, "b": 1}
    assert cheapest(curves, {"a": 10, "b": 10}, 1000) == {"a": 3, "b": 3}, (
        "one unit of each group stays"
    )
    assert cheapest(curves, {"a": 10, "b": 10}, 0) == {"a": 0, "b": 0}
