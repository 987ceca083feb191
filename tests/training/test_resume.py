"""A training that was cut off goes on to the same bits: parameters, losses, generators."""

from __future__ import annotations

import copy
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from cut_off import CutOff, Progress
from tiny_models import tiny_model
from torch import nn

from prunekit.training.low_rank import Updates, train_and_merge
from prunekit.training.recipe import Recipe
from prunekit.training.resume import SavedTraining
from prunekit.training.trainer import _Trainer, train

RECIPE = Recipe(
    lr=1e-2, warmup_steps=2, epochs=3, batch=4, micro_batch=2, eval_every=3, log_every=4, seed=0
)
"""12 steps: three epochs of four, the last one of each short of examples."""


def examples(count, seed):
    rows = torch.randint(8, 100, (count, 12), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": [-100, *row[1:]]} for row in rows.tolist()]


def trained(progress, validation=(), every=1):
    """A model after training with dropout, its history, and what the generators give then."""
    model = tiny_model("llama", layers=2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" in name)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    recipe = replace(RECIPE, progress=progress, save_every=every)
    outside = nn.Parameter(torch.ones(3))
    group = {"params": [outside], "lr": 0.1, "maximize": True, "constant": True}

    def penalty(model, step):
        return (outside * torch.rand(3)).sum() * (step + 1) + random.random() + np.random.rand()

    history = train(
        model, examples(15, 0), recipe, validation=validation, penalty=penalty, parameters=[group]
    )
    return model, history, outside


@pytest.mark.parametrize("validated", [False, True])
@pytest.mark.parametrize("after", [1, 3, 4, 7, 11])
def test_cut_off_after_any_step_it_comes_to_the_same_bits(after, validated):
    validation = examples(3, 1) if validated else ()
    whole, history, outside = trained(None, validation)
    progress = Progress(after)
    with pytest.raises(CutOff):
        trained(progress, validation)
    resumed, again, other = trained(progress, validation)
    assert progress.times == 11  # the last step is not kept: the stage is
    assert again == history
    assert torch.equal(outside, other)
    for (name, a), (_, b) in zip(
        whole.state_dict().items(), resumed.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name


def test_it_is_cut_off_again_and_again():
    whole, history, _ = trained(None)
    progress = Progress()
    for after in (2, 3, 5, 8):
        progress.after = after
        with pytest.raises(CutOff):
            trained(progress)
    resumed, again, _ = trained(progress)
    assert again == history
    assert torch.equal(
        whole.model.layers[1].mlp.up_proj.weight, resumed.model.layers[1].mlp.up_proj.weight
    )


def test_the_scale_of_mixed_float16_goes_on(monkeypatch):
    """On the CPU, which has none of its own: accelerate takes the one that is there."""
    scalers, real = [], _Trainer.create_accelerator_and_postprocess

    def with_scaler(self):
        real(self)
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=3)
        scalers.append(self.accelerator.scaler)

    monkeypatch.setattr(_Trainer, "create_accelerator_and_postprocess", with_scaler)
    trained(None)
    progress = Progress(7)
    with pytest.raises(CutOff):
        trained(progress)
    trained(progress)
    whole, _, resumed = (scaler.state_dict() for scaler in scalers)
    assert whole["scale"] == 2.0 * 2 ** (12 // 3)
    assert resumed == whole


def test_kept_every_so_many_steps():
    progress = Progress()
    _, history, _ = trained(progress, every=5)
    assert progress.times == 2
    assert history == trained(None)[1]


def test_low_rank_updates_with_dropout_go_on():
    def run(progress):
        model = tiny_model("llama")
        names = [n for n, m in model.named_modules() if n.endswith("down_proj")]
        recipe = replace(RECIPE, max_steps=6, progress=progress, save_every=1)
        history, _ = train_and_merge(
            model, Updates(names, 2, 4, 0.3), examples(12, 0), examples(4, 1), recipe, {}
        )
        return copy.deepcopy(model.state_dict()), history

    whole, history = run(None)
    progress = Progress(4)
    with pytest.raises(CutOff):
        run(progress)
    size = sum(t.numel() for n, t in progress.kept.items() if n.startswith("trained:"))
    assert size == 2 * 2 * (64 + 96)  # what is trained, not the model
    resumed, again = run(progress)
    assert again == history
    assert all(torch.equal(w, resumed[n]) for n, w in whole.items())


def test_patience_ends_at_the_same_step_after_a_cut():
    """A rate at which the validation loss soon rises: the looks that were in vain are kept too."""

    def run(progress):
        model = tiny_model("llama")
        recipe = replace(
            RECIPE, lr=0.3, eval_every=1, patience=3, progress=progress, save_every=1, epochs=30
        )
        history = train(model, examples(8, 0), recipe, validation=examples(4, 1))
        return copy.deepcopy(model.state_dict()), history

    whole, history = run(None)
    losses = {r["step"]: r["eval_loss"] for r in history.curve if "eval_loss" in r}
    last = max(losses)
    assert last == history.best_step + 3 < 60
    assert losses[history.best_step] == min(losses.values())
    progress = Progress(last - 2)
    with pytest.raises(CutOff):
        run(progress)
    resumed, again = run(progress)
    assert again == history
    assert progress.times == last - 1  # the step at which it ends is not kept
    assert all(torch.equal(w, resumed[n]) for n, w in whole.items())


@pytest.mark.parametrize("here", [0, 1, 3])
def test_a_training_goes_on_where_there_are_fewer_gpus(here, monkeypatch):
    set_again = {}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: here)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, i: set_again.update({i: state}))
    saved, drawn = object.__new__(SavedTraining), np.random.get_state()
    version, keys, gauss = random.getstate()
    saved.facts = {"python": [version, list(keys), gauss], "numpy": [drawn[0], drawn[1].tolist()]}
    saved.facts["numpy"] += drawn[2:]
    states = {f"random:cuda:{i}": torch.full((2,), i, dtype=torch.uint8) for i in range(2)}
    saved.found = {"random:cpu": torch.get_rng_state(), **states}
    saved.restore_generators()
    assert {i: state.tolist() for i, state in set_again.items()} == {
        i: [i, i] for i in range(min(here, 2))
    }
