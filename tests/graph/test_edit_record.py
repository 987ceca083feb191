"""What `remove` did is known of the model itself: copies have it, other models do not."""

from __future__ import annotations

import copy
import gc
import json

import torch
from foreign import FOREIGN, HEADS, VOCAB
from torch import Tensor, nn

from prunekit.graph import edits, rebuild, remove
from prunekit.graph.edit_record import no_edits
from prunekit.graph.small_model import randomised

TOKENS = torch.randint(0, VOCAB, (2, 16), generator=torch.Generator().manual_seed(2))
KEPT = {"heads.0": torch.arange(HEADS) != 2, "heads.2": torch.arange(HEADS) > 1}


def bloom() -> nn.Module:
    torch.manual_seed(0)
    return randomised(FOREIGN["bloom"]().eval())


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS)


def test_a_copy_has_the_edits_too_and_its_own() -> None:
    model = bloom()
    pruned = remove(copy.deepcopy(model), KEPT)
    known = copy.deepcopy(edits(pruned))
    assert known["arguments"]
    again = copy.deepcopy(pruned)
    del pruned
    gc.collect()
    assert edits(again) == known
    other = copy.deepcopy(again)
    remove(other, {"heads.1": torch.arange(HEADS) != 0})
    assert edits(again) == known != edits(other)
    assert edits(model) == no_edits()


def test_a_rebuilt_model_has_the_edits_that_it_was_rebuilt_by() -> None:
    """Also after a round trip through JSON, and so it can be rebuilt once more."""
    model = bloom()
    pruned = remove(copy.deepcopy(model), KEPT)
    shapes = {n: list(p.shape) for n, p in pruned.named_parameters()}
    expected = logits(pruned)
    for _ in range(2):
        known = json.loads(json.dumps(edits(pruned)))
        pruned, state = rebuild(copy.deepcopy(model), shapes, known), pruned.state_dict()
        pruned.load_state_dict(state)
        assert torch.equal(logits(pruned), expected)


def test_edits_of_dropped_blocks_go_and_others_are_renumbered() -> None:
    pruned = remove(bloom(), KEPT)
    before = edits(pruned)["arguments"]
    assert {"h.0", "h.2"} <= set(before)
    remove(pruned, {"blocks": torch.tensor([False, True, True])})
    assert edits(pruned)["arguments"] == {"h.1": before["h.2"]}
    assert edits(pruned)["blocks"] == {"h": {"of": 3, "keep": [1, 2]}}
    remove(pruned, {"blocks": torch.tensor([False, True])})
    assert edits(pruned)["blocks"] == {"h": {"of": 3, "keep": [2]}}
