"""The dense network beside the pruned one: which sums a sample goes to."""

from __future__ import annotations

import torch

from prunekit.activations.dense_reference import add_in_turn
from prunekit.activations.gram import GramStatistics


def test_samples_go_to_the_sums_in_turn_across_batches():
    x = torch.arange(5.0).view(5, 1, 1).expand(5, 3, 2)  # five samples of three tokens
    w = torch.ones(5, 3)
    stats = [GramStatistics(2), GramStatistics(2)]
    for rows in (slice(0, 3), slice(3, 5)):
        flat = x[rows].reshape(-1, 2)  # as OPT has them
        add_in_turn(stats, rows, flat, None, w[rows])
    assert [s.tokens for s in stats] == [9, 6]
    assert [s.sum_x[0].item() for s in stats] == [3 * (0 + 2 + 4), 3 * (1 + 3)]
