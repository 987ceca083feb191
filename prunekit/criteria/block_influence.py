"""Block influence (ShortGPT, Men et al., arXiv 2403.03853, equation 1): how far a block turns the
hidden state.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from prunekit.activations import processes
from prunekit.activations.hooks import hook_activations, pass_tokens
from prunekit.activations.moments import check_skip
from prunekit.registry import Natural, criteria
from prunekit.types import Group, Run, Scores


@criteria.register(paper="arXiv 2403.03853", year=2024, needs="data", kinds=("blocks",))
@torch.no_grad()
def block_influence(
    model: nn.Module, groups: list[Group], run: Run, *, skip: Natural = 0
) -> Scores:
    """1 - mean cosine between what enters a block and what leaves it, over all tokens of the
    calibration text.

    `skip` leaves out that many tokens at the start of each sample: the very first one often carries
    huge activations that no block turns. One pass through the model. Raises ConfigError where
    `skip` leaves nothing.
    """
    check_skip(run, skip)
    entered: dict[str, Tensor] = {}
    cosines: dict[str, Tensor | float] = {}

    def leave(name: str, x: Tensor) -> None:
        before = entered.pop(name).to(x.device)
        cosine = torch.cosine_similarity(before[:, skip:].float(), x[:, skip:].float(), dim=-1)
        cosines[name] = cosines.get(name, 0.0) + cosine.double().sum()

    names = [n for g in groups for n in g.modules]
    inputs = {n: partial(entered.__setitem__, n) for n in names}
    with hook_activations(model, inputs=inputs, outputs={n: partial(leave, n) for n in names}):
        pass_tokens(processes.own_part(run), "block influence")
    sums = {n: torch.as_tensor(cosines[n]) for n in names}
    processes.add_up(sums.values())
    tokens = run.tokens[:, skip:].numel()
    return {g.name: torch.tensor([1 - float(sums[n]) / tokens for n in g.modules]) for g in groups}
