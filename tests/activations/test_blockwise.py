"""Blocks replayed alone: the same hidden states as in the whole model, for architectures that feed
their blocks differently.
"""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model

from prunekit.activations.block_inputs import capture_inputs
from prunekit.activations.blockwise import groups_by_block, iterate_blocks
from prunekit.activations.hooks import first_tensor
from prunekit.activations.storage import PassOptions
from prunekit.architecture.blocks import block_names
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
def test_replay_equals_the_whole_model(tokens, arch):
    model = tiny_model(arch, layers=3)
    blocks = block_names(model)
    before = hooks_on(model)
    expected = outputs_of(model, blocks, tokens)
    for run in iterate_blocks(
        model, blocks, tokens, PassOptions(batch=3)
    ):  # two batches, the last one smaller
        out = torch.cat([x for _, x in run.outputs()])
        torch.testing.assert_close(out, expected[run.block], rtol=1e-4, atol=1e-4)
    assert run.block == len(blocks) - 1
    assert hooks_on(model) == before


@pytest.mark.parametrize(("store", "tolerance"), [("disk", 1e-5), ("bfloat16", 5e-2)])
def test_activations_elsewhere(tokens, store, tolerance):
    model = tiny_model("llama", layers=3)
    blocks = block_names(model)
    expected = outputs_of(model, blocks, tokens)[-1]
    *_, run = iterate_blocks(model, blocks, tokens, PassOptions(store, batch=2))
    out = torch.cat([x for _, x in run.outputs()])
    assert (out - expected).norm() <= tolerance * expected.norm()


def test_the_next_block_sees_what_was_done_to_this_one(tokens):
    model = tiny_model("llama", layers=3)
    blocks = block_names(model)
    for run in iterate_blocks(model, blocks, tokens, PassOptions(batch=2)):
        if run.block == 0:
            with torch.no_grad():
                model.get_submodule(blocks[0]).mlp.down_proj.weight.zero_()
    torch.testing.assert_close(
        torch.cat([x for _, x in run.outputs()]),
        outputs_of(model, blocks, tokens)[-1],
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize(
    ("arch", "layers", "runs"),
    [("llama", 3, [5, 1, 1]), ("gemma3_text", 7, [5, 3, 3, 3, 3, 3, 1])],
)
def test_only_one_sample_runs_the_whole_model(arch, layers, runs, tokens):
    """The batches run to the last block that gets something new: gemma's first full attention,
    whose mask the blocks before it have not; the third batch runs nothing, as two agree.
    """
    model = tiny_model(arch, layers=layers)
    blocks = block_names(model)
    calls = dict.fromkeys(blocks, 0)

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    hooks = [model.get_submodule(b).register_forward_pre_hook(count(b)) for b in blocks]
    capture_inputs(model, blocks, tokens, PassOptions(batch=1))
    for hook in hooks:
        hook.remove()
    assert len(tokens) == 4
    assert list(calls.values()) == runs


def test_arguments_that_differ_by_batch_reach_every_block(tokens, monkeypatch):
    """A mask of the text's own, made once for all blocks: the same as in the whole model."""
    model = tiny_model("llama", layers=3)
    blocks = block_names(model)
    plain = model.model.forward

    def masked(input_ids, **kwargs):
        there = input_ids % 3 > 0
        there[:, 0] = True
        return plain(input_ids=input_ids, **kwargs | {"attention_mask": there.long()})

    monkeypatch.setattr(model.model, "forward", masked)
    want = outputs_of(model, blocks, tokens)
    runs = iterate_blocks(model, blocks, tokens, PassOptions(batch=1))
    for run, expected in zip(runs, want, strict=True):
        found = torch.cat([x for _, x in run.outputs()])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_numbers_that_depend_on_the_batch_are_its_own(tokens):
    """Not those of the one sample that goes through the whole model."""
    model = tiny_model("llama", layers=3)
    blocks = block_names(model)

    def counted(module, args, kwargs):
        return args, kwargs | {"samples": len(args[0])}

    for b in blocks:
        model.get_submodule(b).register_forward_pre_hook(counted, with_kwargs=True)
    _, feed = capture_inputs(model, blocks, tokens, PassOptions(batch=3))
    assert [[kwargs["samples"] for _, kwargs in calls] for calls in feed.calls] == [[3, 1]] * 3


def test_an_error_inside_a_block_comes_out(tokens):
    model = tiny_model("llama")
    blocks = block_names(model)
    before = hooks_on(model)

    def broken(*_):
        raise ValueError("from inside")

    handle = model.get_submodule(blocks[1]).register_forward_hook(broken)
    with pytest.raises(ValueError, match="from inside"):
        capture_inputs(model, blocks, tokens, PassOptions(batch=2))
    handle.remove()
    assert hooks_on(model) == before


def looped(model):
    """Runs its blocks twice, as models that think in rounds do."""
    model.model.layers.append(model.model.layers[0])
    model.config.num_hidden_layers += 1


def along_tokens(model):
    """Gives the blocks their tokens first."""
    embed = model.model.embed_tokens
    embed.register_forward_hook(lambda _m, _a, out: out.transpose(0, 1))


def several_states(model):
    """Gives the blocks several states for each token."""
    embed = model.model.embed_tokens
    embed.register_forward_hook(lambda _m, _a, out: out[None].expand(2, *out.shape))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (looped, "does not run model.layers.0 to model.layers.1 once each"),
        (along_tokens, r"model.layers.0 reads \(16, 1, 64\) for 1 x 16 tokens"),
        (several_states, r"model.layers.0 reads \(2, 1, 16, 64\) for 1 x 16"),
    ],
)
def test_a_model_whose_blocks_are_no_chain_is_refused(tokens, change, says):
    model = tiny_model("llama", layers=2)
    change(model)
    with pytest.raises(ConfigError, match=says):
        capture_inputs(model, ("model.layers.0", "model.layers.1"), tokens, PassOptions())


def test_states_that_are_not_finite_are_told_from_a_chain_that_is_broken(tokens):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3] = torch.inf
    with pytest.raises(ConfigError, match=r"what model\.layers\.0 puts out .* is not finite"):
        capture_inputs(model, block_names(model), tokens, PassOptions())


def test_there_is_no_loss_inside_a_block(tokens):
    model = tiny_model("llama")
    run = next(iterate_blocks(model, block_names(model), tokens, PassOptions(batch=2)))
    with pytest.raises(ConfigError, match="needs the loss"):
        next(run.losses())


def test_units_outside_the_blocks_are_refused():
    model = tiny_model("llama")
    groups = discover(model, verify=False)
    with pytest.raises(ConfigError, match="hidden is not inside one block"):
        groups_by_block([g for g in groups if g.kind == "hidden"], block_names(model))
