"""The pruned network beside the dense one: how far a reader's output should move, and which tokens
count how much.
"""

from __future__ import annotations

import copy

import pytest
import torch
from blocks import hidden_states
from foreign import ListedSigmoid
from tiny_models import tiny_model

from prunekit import graph
from prunekit.activations.block_inputs import capture_inputs
from prunekit.activations.dense_reference import (
    PairedStreams,
    add_in_turn,
    check_readers,
    forward_until,
    is_residual_sum,
    readers_by_block,
    token_weights,
)
from prunekit.activations.gram import GramStatistics
from prunekit.activations.storage import PassOptions
from prunekit.architecture.blocks import block_names
from prunekit.errors import ConfigError


@pytest.fixture
def model():
    return tiny_model("llama", layers=2)


def paired(model, tokens, adds=True, block=0):
    """Both streams at a block, and the readers in it."""
    blocks = block_names(model)
    inputs, feed = capture_inputs(model, blocks, tokens, PassOptions(batch=2))
    readers = readers_by_block(model, blocks, graph.discover(model, verify=False))[block]
    before = copy.deepcopy(model.get_submodule(blocks[block]))
    names = [r.inside for r in readers]
    streams = PairedStreams(feed, block, names, before, inputs.clone(), inputs, adds)
    return streams, readers, model.get_submodule(blocks[block])


def watched(block, module, x, tokens):
    """Input and output of a module in a block that runs alone on `x`."""
    seen = []
    hook = module.register_forward_hook(lambda _m, args, out: seen.append((args[0], out)))
    positions = torch.arange(x.shape[1])[None]
    with torch.no_grad():
        rotary = tiny_model("llama", layers=2).model.rotary_emb(x, positions)
        out = block(x, position_embeddings=rotary)
    hook.remove()
    return *seen[0], out


@torch.no_grad()
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("place", [0, 1])
def test_a_reader_should_move_by_what_the_dense_network_is_ahead(model, tokens, adds, place):
    """`C = sum x (dense - own)^T`, of the residual stream after the reader or of its own output."""
    streams, readers, block = paired(model, tokens, adds)
    dense = copy.deepcopy(block)
    block.self_attn.v_proj.weight *= 0.5
    block.mlp.up_proj.weight *= 0.8
    x = hidden_states(model, tokens)[0]
    name = readers[place].inside
    inputs, y, _ = watched(block, block.get_submodule(name), x, tokens)
    _, y_dense, _ = watched(dense, dense.get_submodule(name), x, tokens)
    move = y_dense - y
    if adds and place == 1:  # and what the first reader lacks
        first = readers[0].inside
        move += watched(dense, dense.get_submodule(first), x, tokens)[1]
        move -= watched(block, block.get_submodule(first), x, tokens)[1]
    (stats,) = streams.regression(block, readers[place], relative=False)
    flat, wanted = inputs.flatten(0, 1), move.flatten(0, 1)
    assert wanted.norm() > 0
    assert torch.allclose(stats.cross, flat.T @ wanted, atol=1e-4)
    assert torch.allclose(stats.gram, flat.T @ flat, rtol=1e-4, atol=1e-4)
    assert stats.tokens == tokens.numel()


@torch.no_grad()
def test_relative_errors_count_by_the_size_of_the_stream(model, tokens):
    streams, readers, block = paired(model, tokens)
    x = hidden_states(model, tokens)[0]
    reader = block.get_submodule(readers[0].inside)
    inputs, y, _ = watched(block, reader, x, tokens)
    w = 1 / (x + y).square().mean(-1).flatten()
    (stats,) = streams.regression(block, readers[0], relative=True)
    flat = inputs.flatten(0, 1)
    assert torch.allclose(stats.gram, flat.T @ (flat * w[:, None]), rtol=1e-4, atol=1e-4)
    assert float(stats.total) == pytest.approx(float(w.sum()), rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("regress", [[], [0], [0, 1]])
def test_both_streams_stand_before_the_next_block(model, tokens, regress):
    """Whichever readers were regressed: the last one brings the dense stream along by itself."""
    dense = hidden_states(model, tokens)
    streams, readers, block = paired(model, tokens)
    block.mlp.down_proj.weight *= 0.5
    for place in regress:
        streams.regression(block, readers[place], relative=False)
    streams.advance(block)
    every = slice(0, len(tokens))
    assert torch.allclose(streams.dense[every], dense[1], atol=1e-5)
    assert torch.allclose(streams.own[every], hidden_states(model, tokens)[1], atol=1e-5)
    assert not torch.allclose(streams.own[every], dense[1], atol=1e-3)


def test_tokens_count_by_their_size_or_all_alike():
    residual = torch.ones(1, 3, 4) * torch.tensor([1.0, 2.0, 10.0])[None, :, None]
    weights = token_weights(residual, relative=True)
    assert weights[0].tolist() == pytest.approx([1.0, 0.25, 0.01])
    assert token_weights(residual, relative=False) is None


def test_samples_go_to_the_sums_in_turn_across_batches():
    x = torch.arange(5.0).view(5, 1, 1).expand(5, 3, 2)  # five samples of three tokens
    w = torch.ones(5, 3)
    stats = [GramStatistics(2), GramStatistics(2)]
    for rows in (slice(0, 3), slice(3, 5)):
        flat = x[rows].reshape(-1, 2)  # as OPT has them
        add_in_turn(stats, rows, flat, None, w[rows])
    assert [s.tokens for s in stats] == [9, 6]
    assert [s.sum_x[0].item() for s in stats] == [3 * (0 + 2 + 4), 3 * (1 + 3)]


def test_a_block_whose_output_is_more_than_a_sum_is_told_apart(model, tokens):
    streams, _, block = paired(model, tokens)
    assert is_residual_sum(streams.feed, 0, block, streams.own, streams.names)
    assert not is_residual_sum(streams.feed, 0, block, streams.own, streams.names[:1])


def test_a_module_that_sees_some_tokens_alone_is_refused(tokens):
    torch.manual_seed(0)
    model = ListedSigmoid().eval()
    inputs, feed = capture_inputs(model, block_names(model), tokens % 97, PassOptions())
    with pytest.raises(ConfigError, match=r"experts\.1\.w2 of a block does not see every token"):
        forward_until(feed, model.layers[0], 0, 0, inputs[feed.rows[0]], ["experts.1.w2"])


def test_a_group_that_nothing_in_a_block_reads_is_named(model):
    groups = [g for g in graph.discover(model, verify=False) if g.kind in ("heads", "neurons")]
    rows = readers_by_block(model, block_names(model), groups)
    check_readers(groups, rows)
    with pytest.raises(ConfigError, match=f"{rows[1][0].group.name} has none|have none"):
        check_readers(groups, rows[:1])
