"""Distillation: the student learns the teacher's distribution of the next token besides the text
(Hinton et al., arXiv 1503.02531).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunekit.errors import ConfigError

Teacher = nn.Module | Callable[[dict[str, Tensor]], Tensor]
"""A causal language model in eval mode, or a function from a batch (`input_ids`, `attention_mask`,
both `(N, T)`) to logits `(N, T, V)`.
"""
Direction = Literal["forward", "reverse"]
"""KL(teacher || student), which covers all that the teacher says, or KL(student || teacher), which
keeps to what it says most (MiniLLM, arXiv 2306.08543).
"""
CHUNK = 2**24
"""Logits that are turned into float32 at a time: 64 MiB."""


@dataclass(frozen=True)
class Distillation:
    """`loss = (1 - weight) * CE + weight * temperature^2 * KL + hidden * gap`, the KL of both
    distributions at `temperature`: `KL(teacher || student)` if `direction` is forward, else the
    reverse; the gap as `summed_gap` says, a token.

    blocks: with `hidden`, the teacher's block that each of the student's was.

    Raises ConfigError for a weight outside of 0 to 1, or a temperature that is not positive.
    """

    weight: float = 0.5
    temperature: float = 1.0
    direction: Direction = "forward"
    hidden: float = 0.0
    blocks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ConfigError(f"weight={self.weight} of the distillation; possible: 0 to 1")
        if self.temperature <= 0:
            raise ConfigError(f"temperature={self.temperature}; possible: above 0")


class Said(NamedTuple):
    """`logits` (N, T, V), and (N, T, C) before the first block and after every block, if asked
    for.
    """

    logits: Tensor
    hidden_states: Sequence[Tensor] | None = None


@torch.no_grad()
def said_by(teacher: Teacher, batch: dict[str, Tensor], hidden: bool = False) -> Said:
    """What the teacher says of a batch, whose labels it does not see. Raises ConfigError for the
    hidden states of a teacher that is not a model.
    """
    inputs = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}
    if isinstance(teacher, nn.Module):
        asked = {"output_hidden_states": True} if hidden else {}
        out = teacher(**inputs, **asked, use_cache=False)
        return Said(out.logits, out.hidden_states if hidden else None)
    if hidden:
        raise ConfigError("the teacher is a function: it has no hidden states to learn")
    return Said(teacher(inputs))


def summed_loss(how: Distillation, student: Any, teacher: Said, learnt: Tensor) -> Tensor:
    """The teacher's part of the loss, summed over the positions `learnt (N, T)`."""
    kl = summed_kl(student.logits, teacher.logits, learnt, how.temperature, how.direction)
    loss = how.weight * how.temperature**2 * kl
    if how.hidden and teacher.hidden_states is not None:
        gap = summed_gap(student.hidden_states, teacher.hidden_states, how.blocks, learnt)
        loss = loss + how.hidden * gap.to(loss.device)
    return loss


def summed_gap(
    student: Sequence[Tensor], teacher: Sequence[Tensor], blocks: Sequence[int], learnt: Tensor
) -> Tensor:
    """`|s - t|^2 / |t|^2` of what each block but the last puts out, its mean over the blocks,
    summed over the positions `learnt (N, T)`, float32 (the intermediate loss of Minitron, arXiv
    2407.14679, on the residual stream).

    student, teacher: (N, T, C) before the first block and after every one; block i of the student
    was block `blocks[i]` of the teacher. What the last block puts out is left to the logits: most
    models give it normalised.
    """
    total = torch.zeros((), device=student[0].device)
    pairs = [(student[i + 1], teacher[b + 1]) for i, b in enumerate(blocks[:-1])]
    for s, t in pairs:
        aim = t.to(s.device).float()
        # The state of a pad may be zero, and the gradient of what is masked would be no number.
        size = aim.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
        gap = (s.float() - aim).square().sum(-1) / size
        total = total + gap.masked_fill(~learnt.to(s.device), 0).sum().to(total.device)
    return total / max(1, len(pairs))


def state_error(student: Tensor, teacher: Tensor, there: Tensor, relative: bool) -> Tensor:
    """Mean of `(s - t)^2` over the places that are `there`, all `(N, T, C)`, in float32; `relative`
    is the mean over tokens of `|s - t|^2 / |t|^2`.
    """
    aim = teacher.to(student.device).float()
    error = (student.float() - aim).square().masked_fill(~there, 0)
    if not relative:
        return error.sum() / there.sum().clamp(min=1)
    size = aim.square().masked_fill(~there, 0).sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
    return (error.sum(-1) / size).sum() / there.any(-1).sum().clamp(min=1)


def learnt_positions(labels: Tensor) -> Tensor:
    """(N, T) True where the next token of `labels (N, T)` is learnt."""
    return F.pad(labels[:, 1:] != -100, (0, 1))


def summed_kl(
    student: Tensor,
    teacher: Tensor,
    learnt: Tensor,
    temperature: float,
    direction: Direction = "forward",
) -> Tensor:
    """Sum of the KL in one direction over the positions `learnt (N, T)`, in nats, float32.

    student, teacher: logits `(N, T, V)`. A stretch of tokens at a time is turned into float32, in
    the backward again, so that memory beyond the logits themselves does not grow with N or T.
    Raises ConfigError for vocabularies of different size.
    """
    if student.shape != teacher.shape:
        raise ConfigError(
            f"the teacher's logits are {tuple(teacher.shape)}, the student's "
            f"{tuple(student.shape)}: distillation needs one vocabulary"
        )
    size = student.shape[-1]
    flat = (student.reshape(-1, size), teacher.to(student.device).reshape(-1, size))
    rows = learnt.to(student.device).reshape(-1)
    total: Tensor = _SummedKL.apply(*flat, rows, temperature, direction)  # type: ignore[no-untyped-call]
    return total


class _SummedKL(torch.autograd.Function):
    """The gradient in the student's logits is `(q - p) / T` forward, and reverse
    `q (log q - log p - KL) / T`, with p the teacher's and q the student's distribution.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        learnt: Tensor,
        temperature: float,
        direction: Direction,
    ) -> Tensor:
        ctx.save_for_backward(student, teacher, learnt)
        ctx.temperature, ctx.direction = temperature, direction
        total = torch.zeros((), device=student.device)
        for rows in _chunks(student):
            pair = [(x[rows].float() / temperature).log_softmax(-1) for x in (student, teacher)]
            of, to = pair if direction == "reverse" else pair[::-1]
            kl = F.kl_div(to, of, reduction="none", log_target=True).sum(-1)
            total += kl.masked_fill(~learnt[rows], 0).sum()
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        student, teacher, learnt = ctx.saved_tensors
        out = torch.empty_like(student)
        for rows in _chunks(student):
            pair = ((x[rows].float() / ctx.temperature).log_softmax(-1) for x in (student, teacher))
            log_q, log_p = pair
            if ctx.direction == "reverse":
                gap = log_q - log_p
                q = log_q.exp()
                gradient = q * (gap - (q * gap).sum(-1, keepdim=True))
            else:
                gradient = log_q.exp_().sub_(log_p.exp_())
            gradient.mul_(grads[0] / ctx.temperature)
            out[rows] = gradient.masked_fill_(~learnt[rows, None], 0)
        return out, None, None, None, None


def _chunks(logits: Tensor) -> list[slice]:
    """Stretches of rows of `logits (M, V)` of about `CHUNK` elements."""
    step = max(1, CHUNK // logits.shape[1])
    return [slice(i, i + step) for i in range(0, len(logits), step)]
