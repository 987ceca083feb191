"""A model's distributions of the next token, condensed to the most likely tokens and what is
left, and how far another model's are from them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from prunekit.errors import ConfigError

ROWS = 64
"""Positions that are turned into log-probabilities at a time: 12 MB at 50,000 tokens, which an
allocator hands out again; larger ones come fresh from the system each time, and cost more than the
arithmetic does.
"""


def condense(log_p: Tensor, top: int) -> dict[str, Tensor]:
    """Of log-probabilities `(T, V)` the `top` largest: `ids (T, K)` int32 and `log_p (T, K)`, the
    most likely first; `log_tail (T,)`, log of the others' mass; `tail (T,)`, their sum of p log p.
    """
    found = log_p.topk(min(top, log_p.shape[-1]), dim=-1)
    shares = log_p.clone()
    log_tail, highest = _left(shares, found.indices)
    rest = log_p.scatter(-1, found.indices, 0.0).clamp_(min=torch.finfo(log_p.dtype).min)
    tail = highest.exp() * shares.mul_(rest).sum(-1)
    return {"ids": found.indices.int(), "log_p": found.values, "log_tail": log_tail, "tail": tail}


def _left(log_q: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Log of the mass of all tokens but `ids (T, K)`, and the largest log-probability among them,
    both `(T,)`. `log_q (T, V)` becomes each one's probability divided by that largest one, 0 at
    `ids`.
    """
    log_q.scatter_(-1, ids, -torch.inf)
    highest = log_q.amax(-1).clamp(min=torch.finfo(log_q.dtype).min)
    log_q.sub_(highest[:, None]).exp_()
    return log_q.sum(-1).log() + highest, highest


def compare(reference: dict[str, Tensor], log_q: Tensor) -> dict[str, Tensor]:
    """How far `log_q (T, V)`, which is overwritten, is from the condensed `reference`; `(T,)` each,
    in nats where a log.

    `kl`: of the distributions whose tail is one outcome. That is at most KL(p || q), by the log sum
    inequality, and short of it by at most `kl_gap` = sum of p log p over the tail - t log(min q) -
    t log(t / u), with t and u the tails' masses under p and q. `top1`: whether the reference's most
    likely token is one of the most likely ones here. `acceptance`: sum of min(p, q) with the tail
    as one outcome, at most `acceptance_gap` = min(t, u) above the true one.
    """
    ids = reference["ids"].to(log_q.device).long()
    log_p, log_t, tail = (reference[k].to(log_q.device) for k in ("log_p", "log_tail", "tail"))
    smallest = torch.finfo(log_q.dtype).min
    chosen = log_q.gather(-1, ids)
    lowest, likely = log_q.amin(-1).clamp(min=smallest), log_q.amax(-1)
    log_u = _left(log_q, ids)[0]
    t, u = log_t.exp(), log_u.exp()
    of_tail = torch.where(t > 0, t * (log_t - log_u.clamp(min=smallest)), 0.0)
    p = log_p.exp()
    return {
        "kl": (p * (log_p - chosen.clamp(min=smallest))).sum(-1) + of_tail,
        "kl_gap": torch.where(t > 0, tail - t * lowest - of_tail, 0.0).clamp(min=0),
        "top1": (chosen[:, 0] >= likely).to(log_q.dtype),
        "acceptance": torch.minimum(p, chosen.exp()).sum(-1) + torch.minimum(t, u),
        "acceptance_gap": torch.minimum(t, u),
    }


def check_vocabulary(reference: dict[str, Tensor], size: int) -> None:
    """Raises ConfigError for a reference with tokens that a vocabulary of this size lacks."""
    largest = int(reference["ids"].max())
    if largest >= size:
        raise ConfigError(
            f"the dense model's vocabulary is not this one's: token {largest} of {size}"
        )


def measure(
    model: nn.Module,
    windows: Tensor,
    *,
    batch: int,
    top: int,
    name: str,
    reference: dict[str, Tensor] | None = None,
    prompt: Sequence[int] = (),
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The condensed distributions behind each position but the last of `windows (N, T)`, and means
    by window `(N,)`, float64, of `nll` and of what `compare` gives.

    Without a `reference` it is condensed on the way, and the model compared with itself. `prompt`:
    tokens before each window, of which none is predicted. All tensors are on the CPU.
    """
    made: list[dict[str, Tensor]] = []
    means: list[dict[str, Tensor]] = []
    for i, (row, logits) in enumerate(_logits(model, windows, batch, name, prompt)):
        if reference is not None and i == 0:
            check_vocabulary(reference, logits.shape[-1])
        # A device is waited for once a window, not once every few rows.
        stored = (
            None if reference is None else {k: v[i].to(logits.device) for k, v in reference.items()}
        )
        targets = row[1:, None].to(logits.device)
        parts, sums = [], []
        for start in range(0, len(logits), ROWS):
            rows = slice(start, start + ROWS)
            log_q = logits[rows].float().log_softmax(-1)
            part = {k: v[rows] for k, v in stored.items()} if stored else condense(log_q, top)
            found = {"nll": -log_q.gather(-1, targets[rows])[:, 0], **compare(part, log_q)}
            sums.append(torch.stack([v.double().sum() for v in found.values()]))
            parts.append(part)
        mean = torch.stack(sums).sum(0).cpu() / len(logits)
        means.append(dict(zip(found, mean, strict=True)))
        if reference is None:
            made.append({k: torch.cat([p[k] for p in parts]).cpu() for k in parts[0]})
    if reference is None:
        reference = {k: torch.stack([m[k] for m in made]) for k in made[0]}
    return reference, {k: torch.stack([m[k] for m in means]) for k in means[0]}


@torch.inference_mode()
def _logits(
    model: nn.Module, windows: Tensor, batch: int, name: str, prompt: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each window with the logits `(T - 1, V)` behind all of its tokens but the last."""
    device = next(model.parameters()).device
    with tqdm(total=len(windows), desc=name, unit="window", leave=False) as bar:
        for rows in windows.split(batch):
            before = torch.tensor([*prompt], dtype=rows.dtype).expand(len(rows), -1)
            whole = torch.cat([before, rows.cpu()], 1).to(device)
            found: Any = model(input_ids=whole, use_cache=False)
            yield from zip(rows, found.logits[:, len(prompt) : -1], strict=True)
            bar.update(len(rows))
