"""Learned masks on a model: drawn anew for every forward of the training, folded into the weights
at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prunekit import graph
from prunekit.graph.fold_gates import block_parts, fold
from prunekit.training.hard_concrete import (
    LIMITS,
    START,
    by_rank,
    deterministic,
    open_probability,
    sample,
    slope,
    soft,
)
from prunekit.types import Group, Kept, Scores

NEAR = 1e-6
"""What noise keeps away from 0 and 1."""


class LearnedMasks:
    """Gates over the units of groups, of which `log_alpha` is trained.

    Each forward in train mode draws z; in eval mode z is `deterministic`, or what `hold` said.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        seed: int,
        *,
        order: Scores | None = None,
        bounded: bool = True,
    ):
        """order: scores by whose ranks inside of its group log alpha begins, the highest as dropped
        least; None: all begin alike.
        bounded: log alpha itself is kept between the limits, not only what is drawn of it.
        """
        device = next(model.parameters()).device
        self.model, self.groups = model, list(groups)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.units = [g.units for g in groups]
        noise = torch.randn(sum(self.units), device=device, generator=self.generator)
        begin = START + 0.01 * noise
        if order is not None:
            begin = torch.cat([by_rank(order[g.name]) for g in groups]).to(noise)
        self.log_alpha = nn.Parameter(begin)
        self.bounded = bounded
        self.offset = torch.zeros_like(begin)
        """Added to log alpha wherever it is used."""
        self.parts = [
            part
            for g in self.groups
            for part in (block_parts(model, g) if g.kind == "blocks" else [g])
        ]
        self.z = {
            p.name: torch.ones(p.units, device=device, requires_grad=True) for p in self.parts
        }
        self._slopes = torch.zeros_like(self.log_alpha)
        self._held: Tensor | None = None

    # ---- what is learnt

    def now(self) -> Tensor:
        """log alpha with its offset, between the limits."""
        return (self.log_alpha + self.offset).clamp(*LIMITS)

    def log_alphas(self) -> Scores:
        """(U,) of each group, as scores: the highest stay."""
        parts = (self.log_alpha.detach() + self.offset).split(self.units)
        return {g.name: a for g, a in zip(self.groups, parts, strict=True)}

    def opened(self) -> tuple[Tensor, ...]:
        """(U,) P(z > 0), group by group, to which gradients flow."""
        parts: tuple[Tensor, ...] = torch.split(open_probability(self.now()), self.units)
        return parts

    @torch.no_grad()
    def deterministic(self) -> Tensor:
        """z of all units without noise, one group after the other."""
        return torch.cat([deterministic(a) for a in self.now().split(self.units)])

    def state(self) -> dict[str, Tensor]:
        """Of the noise: log alpha is kept as all that is trained."""
        return {"noise": self.generator.get_state()}

    def go_on(self, state: Mapping[str, Tensor], examples: int) -> None:
        self.generator.set_state(state["noise"].cpu())

    # ---- on a model

    @contextmanager
    def on_model(self) -> Iterator[None]:
        """Inside, every forward of the model is masked."""
        hooks = [
            self.z[part.name].register_hook(self._pass_on(start, part.units))
            for start, part in self._places()
        ]
        hooks.append(self.model.register_forward_pre_hook(self._before_forward))
        try:
            with graph.gated(self.model, self.parts, self.z):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _places(self) -> Iterator[tuple[int, Group]]:
        """Where the units of each part begin among all."""
        start = 0
        for part in self.parts:
            yield start, part
            start += part.units

    def _pass_on(self, start: int, units: int) -> Any:
        """z is a leaf that stays where it is, as the hooks in the model know it: what it gets of
        gradients is handed on to log alpha.
        """

        def hook(gradient: Tensor) -> None:
            whole = torch.zeros_like(self.log_alpha)
            whole[start : start + units] = gradient * self._slopes[start : start + units]
            self.log_alpha.grad = whole + (
                0 if self.log_alpha.grad is None else self.log_alpha.grad
            )

        return hook

    @torch.no_grad()
    def _before_forward(self, model: nn.Module, args: Any) -> None:
        if self._held is not None:
            return
        if model.training:
            self.draw()
        else:
            self.set(self.deterministic())

    @torch.no_grad()
    def draw(self) -> None:
        """z for the next forward; log alpha is brought back between its limits first."""
        if self.bounded:
            self.log_alpha.clamp_(*LIMITS)
        now = self.now()
        noise = torch.rand(
            self.log_alpha.shape, device=self.log_alpha.device, generator=self.generator
        ).clamp(NEAR, 1 - NEAR)
        self._slopes = slope(now, noise)
        self.set(sample(now, noise))

    @torch.no_grad()
    def set(self, z: Tensor) -> None:
        """z of all units, one after the other."""
        for start, part in self._places():
            leaf = self.z[part.name]
            leaf.grad = None
            leaf.copy_(z[start : start + part.units])

    # ---- at the end

    @torch.no_grad()
    def hold(self, kept: Kept) -> None:
        """From now on z is 0 where `kept` says so, and elsewhere the gate without noise."""
        left = torch.cat([kept[g.name] for g in self.groups]).to(self.log_alpha.device)
        self._held = soft(self.now()) * left
        self.set(self._held)

    @contextmanager
    def using(self, z: Tensor) -> Iterator[None]:
        """Inside, forwards take this z of all units."""
        before, self._held = self._held, z
        self.set(z)
        try:
            yield
        finally:
            self._held = before

    def fold(self) -> None:
        """Multiplies the gates into the weights of the model, which must be free of them."""
        fold(self.model, self.parts, {name: z.detach() for name, z in self.z.items()})
