"""Records, the bar, the best parameters."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from prunekit.training.callbacks import Bar, Best, Curve

ARGS = SimpleNamespace(gradient_accumulation_steps=4)


def state(step: int, first: bool = True) -> SimpleNamespace:
    return SimpleNamespace(global_step=step, max_steps=3, is_world_process_zero=first)


def test_the_bar_moves_inside_a_step_and_ends_at_the_last(capsys):
    bar = Bar()
    bar.on_train_begin(ARGS, state(0), None)
    places = []
    for step in range(1, 4):
        for _ in range(3):  # the last micro-batch of a step ends the step
            bar.on_substep_end(ARGS, state(step - 1), None)
            places.append(bar.bar.n)
        bar.on_step_end(ARGS, state(step), None)
        places.append(bar.bar.n)
        bar.on_log(ARGS, state(step), None, {"loss": 2.0 / step})
    assert places == [i / 4 for i in range(1, 13)]
    bar.on_train_end(ARGS, state(3), None)
    last = capsys.readouterr().err.rstrip().rpartition("\r")[2]
    assert "3/3 steps" in last
    assert "loss=0.667" in last
    assert bar.bar is None


def test_the_bar_says_how_far_validation_is(capsys):
    bar = Bar()
    bar.on_train_begin(ARGS, state(0), None)
    for _ in range(2):
        bar.on_prediction_step(ARGS, state(1), None, eval_dataloader=[0, 0, 0])
    assert bar.bar.desc == "validation 2/3: "
    bar.on_log(ARGS, state(1), None, {"eval_loss": 1.5})
    bar.on_evaluate(ARGS, state(1), None)
    assert bar.bar.desc == "training: "
    bar.on_prediction_step(ARGS, state(2), None, eval_dataloader=[0, 0, 0])
    assert bar.bar.desc == "validation 1/3: "
    assert "validation=1.500" in bar.bar.postfix


def test_other_processes_show_no_bar(capsys):
    bar = Bar()
    for call in (bar.on_train_begin, bar.on_substep_end, bar.on_step_end, bar.on_evaluate):
        call(ARGS, state(1, first=False), None)
    bar.on_prediction_step(ARGS, state(1, first=False), None, eval_dataloader=[0])
    bar.on_log(ARGS, state(1, first=False), None, {"loss": 1.0})
    bar.on_train_end(ARGS, state(1, first=False), None)
    assert capsys.readouterr() == ("", "")


def test_records_are_json_and_a_loss_that_is_not_finite_is_said(caplog):
    curve = Curve()
    curve.on_log(None, state(1), None, {"loss": float("nan"), "grad_norm": float("inf")})
    curve.on_log(None, state(2), None, {"eval_loss": 1.0, "eval_runtime": 3.0})
    curve.on_log(None, state(3), None, {"train_runtime": 3.0})
    want = [{"step": 1, "loss": None, "grad_norm": None}, {"step": 2, "eval_loss": 1.0}]
    assert curve.records == want
    assert "step 1: the training loss is nan" in caplog.text


def test_the_lowest_loss_is_kept_and_a_loss_that_is_not_finite_never():
    parameter = nn.Parameter(torch.zeros(2))
    best = Best([parameter])
    for step, loss in enumerate((float("nan"), 2.0, 1.0, 1.0, float("nan"))):
        with torch.no_grad():
            parameter.fill_(step)
        best.on_evaluate(None, state(step), None, {"eval_loss": loss})
    best.restore()
    assert best.step == 2
    assert parameter.tolist() == [2, 2]


def test_without_a_finite_loss_the_last_step_stays():
    parameter = nn.Parameter(torch.ones(2))
    best = Best([parameter])
    best.on_evaluate(None, state(1), None, {"eval_loss": float("nan")})
    best.restore()
    assert best.step is None
    assert parameter.tolist() == [1, 1]
