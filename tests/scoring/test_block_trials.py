"""Trials that start at a block cost what the whole model would."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model

from prunekit.architecture.blocks import block_names
from prunekit.errors import ConfigError
from prunekit.scoring.block_trials import BlockTrials, TrialOptions, text_cost


@pytest.fixture
def text():
    """(5, 12) tokens: the last batch is smaller."""
    return torch.randint(8, 100, (5, 12), generator=torch.Generator().manual_seed(0))


def test_costs_are_the_loss_and_the_share_of_tokens_that_do_not_rank_first(text):
    model = tiny_model("llama")
    with torch.no_grad():
        logits = model(text).logits[:, :-1]
    wanted = text[:, 1:]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
    wrong = sum(int(a.argmax() != b) for row, ids in zip(logits, wanted) for a, b in zip(row, ids))
    assert text_cost(model, text, TrialOptions("loss", 2)) == pytest.approx(float(loss), rel=1e-5)
    assert text_cost(model, text, TrialOptions("accuracy", 2)) == pytest.approx(wrong / 55)


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt", "qwen2_moe"])
def test_a_trial_in_a_block_costs_what_the_whole_model_does(arch, metric, text):
    model = tiny_model(arch, layers=4 if arch == "llama" else 2)
    before = text_cost(model, text, TrialOptions(metric, 2))
    for block in block_names(model):
        trials = BlockTrials(model, block, text, TrialOptions(metric, 2))
        assert trials.cost() == pytest.approx(before, rel=1e-5)
        with torch.no_grad():
            for p in model.get_submodule(block).parameters():
                p.mul_(1.5)
        whole = text_cost(model, text, TrialOptions(metric, 2))
        assert trials.cost() == pytest.approx(whole, rel=1e-5)
        assert metric == "accuracy" or whole != before
        before = whole


def test_what_comes_before_the_block_is_not_run_again(text):
    model = tiny_model("llama", layers=3)
    first, *_ = model.model.layers
    calls = []
    first.mlp.register_forward_hook(lambda *_: calls.append(1))
    for reuse, runs in ((True, 0), (False, 3)):
        trials = BlockTrials(model, "model.layers.2", text, TrialOptions("loss", 2, reuse))
        calls.clear()
        trials.cost()
        assert len(calls) == runs


def test_what_comes_after_the_block_is_not_run_for_its_inputs(text):
    """But for the one sample that is checked, from the block on and whole."""
    model = tiny_model("llama", layers=3)
    calls = []
    model.model.layers[2].mlp.register_forward_hook(lambda _m, args, _o: calls.append(len(args[0])))
    BlockTrials(model, "model.layers.1", text, TrialOptions("loss", 2))
    assert calls == [1, 1]


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_blocks_that_hand_each_other_more_are_refused(metric, text):
    """The last block adds what the first one has left behind."""
    model = tiny_model("llama", layers=4)
    left = []
    model.model.layers[0].register_forward_hook(lambda _m, _a, out: left.append(out * 2))

    def add(_module, args):
        return (args[0] + (left.pop() if left else 0), *args[1:])

    model.model.layers[3].register_forward_pre_hook(add)
    with pytest.raises(ConfigError, match=r"more than the residual stream.*pruner\.reuse=false"):
        BlockTrials(model, "model.layers.2", text, TrialOptions(metric, 8))
    whole = text_cost(model, text, TrialOptions(metric, 8))
    trials = BlockTrials(model, "model.layers.2", text, TrialOptions(metric, 8, reuse=False))
    assert trials.cost() == pytest.approx(whole)
