"""Mean, variance and norm of activations, streamed over the calibration text."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.activations import processes
from prunekit.activations.hooks import Observer, hook_activations, pass_tokens
from prunekit.activations.sharing import places_of, reaching, watched
from prunekit.architecture.blocks import block_names
from prunekit.architecture.linear import weight_of
from prunekit.errors import ConfigError
from prunekit.types import Run


class Moments:
    """Mean, variance and norm of each channel over all tokens seen, exact in one pass (Welford's
    update, batch by batch as Chan's).

    The sums are made before any activation is: made among them, they would keep the memory between
    them from being used again (2.6 GiB of a forward of 4,096 tokens on SmolLM2-135M).
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(channels, device=device)
        self.m2 = torch.zeros(channels, device=device)

    def add(self, x: Tensor) -> None:
        """Take in `x (..., channels)`; sums are float32. An expert may be called with no tokens."""
        x = x.reshape(-1, x.shape[-1]).float()
        if not len(x):
            return
        # Offloaded modules run elsewhere than they rest.
        self.mean, self.m2 = self.mean.to(x.device), self.m2.to(x.device)
        mean = x.mean(0)
        gap = mean - self.mean
        total = self.count + len(x)
        self.m2 += (x - mean).square().sum(0) + gap.square() * (self.count * len(x) / total)
        self.mean += gap * (len(x) / total)
        self.count = total

    def add_up(self) -> None:
        """Take in what the other processes saw (Chan's update of all at once)."""
        if processes.count() == 1:
            return
        total = torch.tensor(float(self.count), dtype=torch.float64, device=self.mean.device)
        mean = self.mean * self.count
        processes.add_up([total, mean])
        mean /= total.clamp(min=1)
        self.m2 += (self.mean - mean).square() * self.count
        processes.add_up([self.m2])
        self.mean, self.count = mean, int(total)

    @property
    def variance(self) -> Tensor:
        """(channels,) mean squared distance from the mean, zero where no token was seen."""
        return self.m2 / max(1, self.count)

    @property
    def square(self) -> Tensor:
        """(channels,) mean of x^2."""
        return self.variance + self.mean.square()


@torch.no_grad()
def moments(model: nn.Module, names: Iterable[str], run: Run, skip: int = 0) -> dict[str, Moments]:
    """Moments of the input channels of the linear modules named, and of the others that use their
    matrices: one pass of the calibration tokens, none for what this run has seen.

    `skip` leaves out that many tokens at the start of each sample; a module inside an expert, which
    sees a list of tokens and no samples, counts all of its own. Raises ConfigError where that is
    all of them.
    """
    check_skip(run, skip)
    seen: dict[Any, Moments] = run.statistics
    places = places_of(model, names)
    users = {name: (*watched(model, row), skip) for name, row in places.items()}
    missing: dict[Any, Moments] = {}
    for name, key in users.items():
        if key not in seen:
            W = weight_of(model.get_submodule(name))
            missing[key] = Moments(W.shape[1], "cpu" if W.is_meta else W.device)
    if missing:
        samples = [0]  # of the batch on its way

        def enter(x: Tensor) -> None:
            samples[0] = len(x)

        def see(found: Moments, x: Tensor) -> None:
            found.add(without_skipped(x, samples[0], run.tokens.shape[1], skip))

        inputs: dict[str, Observer] = dict.fromkeys(block_names(model) if skip else (), enter)
        for (*row, _), found in missing.items():
            inputs |= {name: partial(see, found) for name in row}
        with hook_activations(model, inputs=inputs):
            pass_tokens(processes.own_part(reaching(run, places)), "activations")
        for found in missing.values():
            found.add_up()
        seen.update(missing)
    return {name: seen[key] for name, key in users.items()}


def check_skip(run: Run, skip: int) -> None:
    """Raises ConfigError where `skip` tokens are whole samples."""
    length = run.tokens.shape[1]
    if skip >= length:
        raise ConfigError(
            f"skip={skip} leaves nothing of calibration samples of {length} tokens; possible: 0 to "
            f"{length - 1}"
        )


def without_skipped(x: Tensor, samples: int, length: int, skip: int) -> Tensor:
    """`x (N, T, channels)`, or as flat a list of these tokens (OPT's feed-forward), without the
    first `skip` of each sample. Any other list of tokens (an expert's) is left as it is.
    """
    if skip and x.dim() == 2 and len(x) == samples * length:
        x = x.view(samples, length, -1)
    return x[:, skip:] if x.dim() > 2 else x
