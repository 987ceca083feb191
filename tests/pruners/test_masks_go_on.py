"""Masks that are learned: a training that was cut off goes on to the same bits, with the noise, the
teachers and the domains that it had.
"""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from cut_off import CutOff, Progress
from problems import problem, uniform
from tiny_models import tiny_model

from prunekit.models.tiny import byte_tokenizer
from prunekit.registry import pruners

FAST = {"steps": 7, "batch": 2, "micro_batch": 1, "warmup_steps": 0, "save_every": 1}
LOW_RANK = {"r": 2, "mask_lr": 1.0, "warmup": 0.1}
TEXT = torch.randint(8, 100, (5, 16), generator=torch.Generator().manual_seed(0))
"""An odd number of samples: the last step of each pass has one only."""


def nuteprune(progress):
    ratio = uniform(0.3, "prunable", ranking="global")
    of = problem(tiny_model("llama", layers=2), TEXT, ratio=ratio)
    return prune("nuteprune", of, progress, **LOW_RANK, gap=1)


def exact(progress):
    ratio = uniform(0.3, "prunable", ranking="global")
    of = problem(tiny_model("llama", layers=2), TEXT, ratio=ratio)
    return prune("nuteprune", of, progress, **LOW_RANK | {"warmup": 0.8}, constraint="exact")


def compresso(progress, path):
    torch.manual_seed(0)  # rows that are added are drawn
    model = tiny_model("gpt2", max_position_embeddings=1024)
    model.resize_token_embeddings(260, mean_resizing=False)
    ratio = uniform(0.3, "prunable", ranking="global")
    of = dataclasses.replace(problem(model.eval(), TEXT, ratio=ratio), tokenizer=byte_tokenizer())
    kinds = ["heads", "neurons"]
    return prune("compresso", of, progress, **LOW_RANK, kinds=kinds, max_length=400, path=path)


def sheared_llama(progress):
    of = problem(tiny_model("llama", layers=3), TEXT)
    texts = {"calibration": TEXT, "a": TEXT[:2], "b": TEXT[1:]}
    of = dataclasses.replace(of, token_sets=texts)
    shape = {"neurons": 70, "blocks": 2}
    return prune("sheared_llama", of, progress, shape=shape, update_every=1, lr=1e-3)


def prune(name, of, progress, **options):
    of = dataclasses.replace(of, training=progress)
    return pruners.build({"name": name, **FAST, **options})(of)


@pytest.fixture
def alpaca(tmp_path):
    path = tmp_path / "alpaca.jsonl"
    rows = [{"instruction": f"Say {i}.", "input": "", "output": f"It is {i}."} for i in range(5)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.mark.parametrize("after", [1, 3, 5])
@pytest.mark.parametrize("method", [nuteprune, exact, compresso, sheared_llama])
def test_cut_off_after_any_step_it_comes_to_the_same_bits(method, after, alpaca):
    more = (alpaca,) if method is compresso else ()
    whole = method(None, *more)
    progress = Progress(after)
    with pytest.raises(CutOff):
        method(progress, *more)
    again = method(progress, *more)
    assert progress.times == 6  # the last step is not kept: the stage is
    assert again.notes == whole.notes
    assert again.kept.keys() == whole.kept.keys()
    assert all(torch.equal(mask, again.kept[name]) for name, mask in whole.kept.items())
    for (name, a), (_, b) in zip(
        whole.model.state_dict().items(), again.model.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name


def test_an_exact_constraint_holds_to_the_end():
    notes = exact(None).notes
    assert notes["sparsity"] == pytest.approx(notes["target"], abs=0.02)  # but for the last step
    assert abs(nuteprune(None).notes["sparsity"] - notes["target"]) > 0.1


def test_what_these_runs_have_to_remember():
    """Teachers other than the dense model, and weights of domains that change."""
    assert max(nuteprune(None).notes["teachers"]) >= 0
    weights = sheared_llama(None).notes["domain_weights"]
    assert len({tuple(w.values()) for w in weights}) > 2
