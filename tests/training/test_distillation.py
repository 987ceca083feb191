"""The teacher's part of the loss: the plain formula, in little memory."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from prunekit.errors import ConfigError
from prunekit.training import distillation
from prunekit.training.distillation import (
    Distillation,
    learnt_positions,
    said_by,
    summed_gap,
    summed_kl,
)

N, T, V = 3, 7, 50


def logits(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    drawn = torch.randn(N, T, V, generator=torch.Generator().manual_seed(seed))
    return (3 * drawn).to(dtype)


def some_positions() -> torch.Tensor:
    return torch.rand(N, T, generator=torch.Generator().manual_seed(9)) > 0.4


def formula(student, teacher, learnt, temperature, direction="forward"):
    p = (teacher.double() / temperature).softmax(-1)
    q = (student.double() / temperature).softmax(-1)
    p, q = (q, p) if direction == "reverse" else (p, q)
    return (p * (p.log() - q.log())).sum(-1)[learnt].sum()


@pytest.mark.parametrize("chunk", [1, 4 * V, 2**24])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_value_and_gradient_are_those_of_the_formula(monkeypatch, chunk, temperature, direction):
    monkeypatch.setattr(distillation, "CHUNK", chunk)
    learnt = some_positions()
    student = logits(0).requires_grad_()
    plain = logits(0).requires_grad_()
    ours = summed_kl(student, logits(1), learnt, temperature, direction)
    theirs = formula(plain, logits(1), learnt, temperature, direction)
    assert ours.dtype is torch.float32
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)
    (3 * ours).backward()  # a factor on the way back is not lost
    (3 * theirs).backward()
    largest = float(plain.grad.abs().max())  # float32 loses what terms of that size cancel
    torch.testing.assert_close(student.grad, plain.grad.float(), rtol=1e-4, atol=1e-6 * largest)
    assert not student.grad[~learnt].any()


def test_a_student_like_its_teacher_has_nothing_to_learn():
    student = logits(0).requires_grad_()
    kl = summed_kl(student, logits(0), some_positions(), 2.0)
    kl.backward()
    assert kl.item() == 0
    assert not student.grad.any()


def test_positions_that_are_not_learnt_may_hold_anything():
    learnt = some_positions()
    student = logits(0)
    student[~learnt] = torch.nan
    student.requires_grad_()
    kl = summed_kl(student, logits(1), learnt, 1.0)
    kl.backward()
    assert kl.item() == pytest.approx(float(formula(logits(0), logits(1), learnt, 1.0)), rel=1e-5)
    assert torch.isfinite(student.grad).all()


def test_a_position_is_learnt_where_its_next_token_is():
    labels = torch.tensor([[-100, -100, 5, 6], [-100, 7, 8, -100]])
    want = [[False, True, True, False], [True, True, False, False]]
    assert learnt_positions(labels).tolist() == want


def test_no_float32_tensor_of_the_logits_size_is_made(monkeypatch):
    monkeypatch.setattr(distillation, "CHUNK", 2 * V)
    large = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(x, torch.Tensor) and x.dtype is torch.float32:
                    large.append(x.numel())
            return out

    student, teacher = logits(0, torch.bfloat16).requires_grad_(), logits(1, torch.bfloat16)
    with Watch():
        summed_kl(student, teacher, some_positions(), 2.0).backward()
    assert student.grad.dtype is torch.bfloat16
    assert max(large) == 2 * V


def test_a_teacher_is_a_model_or_a_function_and_sees_no_labels():
    seen = []

    class Model(nn.Module):
        def forward(self, **inputs):
            seen.append(sorted(inputs))
            return SimpleNamespace(logits=inputs["input_ids"] * 2.0)

    ids = torch.ones(1, 4, requires_grad=True)
    batch = {"input_ids": ids, "attention_mask": torch.ones(1, 4), "labels": torch.ones(1, 4)}
    for teacher in (Model(), lambda inputs: seen.append(sorted(inputs)) or inputs["input_ids"] * 2):
        found = said_by(teacher, batch).logits
        assert torch.equal(found, torch.full((1, 4), 2.0))
        assert not found.requires_grad
    assert seen == [["attention_mask", "input_ids", "use_cache"], ["attention_mask", "input_ids"]]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weight": 1.5}, "weight=1.5 of the distillation; possible: 0 to 1"),
        ({"weight": -0.1}, "possible: 0 to 1"),
        ({"temperature": 0.0}, "temperature=0.0; possible: above 0"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        Distillation(**options)


def test_vocabularies_must_agree():
    with pytest.raises(ConfigError, match=r"\(3, 7, 49\), the student's \(3, 7, 50\)"):
        summed_kl(logits(0), logits(1)[..., :-1], some_positions(), 1.0)


def test_the_gap_of_hidden_states_is_that_of_the_formula():
    """Blocks 0, 2 and 3 of a teacher of four: the last one is left to the logits."""
    draw = torch.Generator().manual_seed(1)
    student = [torch.randn(N, T, 5, generator=draw) for _ in range(4)]
    teacher = [torch.randn(N, T, 5, generator=draw) for _ in range(5)]
    learnt, total = some_positions(), 0.0
    for s, t in ((student[1], teacher[1]), (student[2], teacher[3])):
        gap = ((s - t).double() ** 2).sum(-1) / (t.double() ** 2).sum(-1)
        total += float(gap[learnt].sum()) / 2
    found = summed_gap(student, teacher, (0, 2, 3), learnt)
    assert float(found) == pytest.approx(total, rel=1e-5)
    assert float(summed_gap(teacher, teacher, (0, 1, 2, 3), learnt)) == 0


def test_pads_whose_states_are_zero_leave_the_gradient_a_number():
    draw = torch.Generator().manual_seed(1)
    student = [torch.randn(N, T, 5, generator=draw).requires_grad_() for _ in range(3)]
    teacher = [torch.randn(N, T, 5, generator=draw) for _ in range(3)]
    learnt = some_positions()
    teacher[1].masked_fill_(~learnt[..., None], 0)
    summed_gap(student, teacher, (0, 1), learnt).backward()
    assert student[1].grad.isfinite().all()
    assert torch.equal(student[1].grad.any(-1), learnt)


def test_a_function_has_no_hidden_states():
    with pytest.raises(ConfigError, match="a function: it has no hidden states"):
        said_by(lambda batch: logits(0), {}, hidden=True)
