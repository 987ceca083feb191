"""Blocks replayed alone: the same hidden states as in the whole model, for architectures that feed
their blocks differently.
"""

from __future__ import annotations

import pytest
import torch

from prunekit.activations.blockwise import Feeding, capture, inside, stack, walk
from prunekit.activations.moments import first_tensor
from prunekit.errors import ConfigError
from prunekit.graph import discover

# Rotary tables, learned positions, sliding and full masks in turn with two norms a branch, ALiBi,
# parallel branches, experts.
ARCHS = ["llama", "gpt2", "gemma2", "gemma3_text", "bloom", "gpt_neox", "opt", "mixtral"]


def outputs_of(model, blocks, ids):
    """What every block puts out in an ordinary forward."""
    seen = []
    hooks = [
        model.get_submodule(b).register_forward_hook(
            lambda m, a, o: seen.append(first_tensor(o).detach().clone())
        )
        for b in blocks
    ]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for h in hooks:
        h.remove()
    return seen


def hooks_on(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("arch", ARCHS)
def test_replay_equals_the_whole_model(tiny_archs, tokens, arch):
    model = tiny_archs.tiny_model(arch, layers=3).eval()
    blocks = stack(discover(model, verify=False))
    before = hooks_on(model)
    expected = outputs_of(model, blocks, tokens)
    for run in walk(model, blocks, tokens, Feeding(3)):  # two batches, the last one smaller
        out = torch.cat(list(run()))
        torch.testing.assert_close(out, expected[run.block], rtol=1e-4, atol=1e-4)
    assert run.block == len(blocks) - 1
    assert hooks_on(model) == before


@pytest.mark.parametrize(("store", "tolerance"), [("disk", 1e-5), ("half", 5e-2)])
def test_activations_elsewhere(tiny_archs, tokens, store, tolerance):
    model = tiny_archs.tiny_model("llama", layers=3).eval()
    blocks = stack(discover(model, verify=False))
    expected = outputs_of(model, blocks, tokens)[-1]
    *_, run = walk(model, blocks, tokens, Feeding(2, store))
    out = torch.cat(list(run()))
    assert (out - expected).norm() <= tolerance * expected.norm()


def test_the_next_block_sees_what_was_done_to_this_one(tiny_archs, tokens):
    model = tiny_archs.tiny_model("llama", layers=3).eval()
    blocks = stack(discover(model, verify=False))
    for run in walk(model, blocks, tokens, Feeding(2)):
        if run.block == 0:
            with torch.no_grad():
                model.get_submodule(blocks[0]).mlp.down_proj.weight.zero_()
    torch.testing.assert_close(
        torch.cat(list(run())), outputs_of(model, blocks, tokens)[-1], rtol=1e-4, atol=1e-4
    )


def test_only_the_first_batches_run_the_whole_model(tiny_archs, tokens):
    model = tiny_archs.tiny_model("llama", layers=2).eval()
    blocks = stack(discover(model, verify=False))
    calls = []
    hook = model.get_submodule(blocks[1]).register_forward_hook(lambda *_: calls.append(1))
    capture(model, blocks, tokens, Feeding(1))
    hook.remove()
    assert len(tokens) == 4
    assert len(calls) == 2


def test_an_error_inside_a_block_comes_out(tiny_archs, tokens):
    model = tiny_archs.tiny_model("llama", layers=2).eval()
    blocks = stack(discover(model, verify=False))
    before = hooks_on(model)

    def broken(*_):
        raise ValueError("from inside")

    handle = model.get_submodule(blocks[1]).register_forward_hook(broken)
    with pytest.raises(ValueError, match="from inside"):
        capture(model, blocks, tokens, Feeding(2))
    handle.remove()
    assert hooks_on(model) == before


def test_there_is_no_loss_inside_a_block(tiny_archs, tokens):
    model = tiny_archs.tiny_model("llama", layers=2).eval()
    run = next(walk(model, stack(discover(model, verify=False)), tokens, Feeding(2)))
    with pytest.raises(ConfigError, match="needs the loss"):
        next(run(labels=True))


def test_units_outside_the_blocks_are_refused(tiny_archs):
    groups = discover(tiny_archs.tiny_model("llama", layers=2), verify=False)
    with pytest.raises(ConfigError, match="hidden is not inside one block"):
        inside([g for g in groups if g.kind == "hidden"], stack(groups))
    with pytest.raises(ConfigError, match="stack of blocks"):
        stack([])
