"""The end of learned masks whose units compete: shared by Compresso and NutePrune."""

from __future__ import annotations

from prunekit import graph
from prunekit.selection.units import choose
from prunekit.training.learned_masks import LearnedMasks
from prunekit.types import Allocation, Kept


def take(masks: LearnedMasks, allocation: Allocation, remove: bool) -> Kept:
    """Removes, or zeroes, the units of lowest log alpha that an allocation takes, with the gates of
    the others folded into the weights. Returns what stays.
    """
    model = masks.model
    kept = choose(model, masks.groups, masks.log_alphas(), allocation)
    masks.hold(kept)
    masks.fold()
    if remove:
        graph.remove(model, kept, norm="rescale")
    else:
        graph.zero(model, kept)
    return kept
