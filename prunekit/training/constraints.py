"""What learned masks come to remove: Lagrangians whose multipliers ascend as the masks descend, or
masks that are brought to the target at every step.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from prunekit.training.hard_concrete import (
    ExpectedSize,
    lagrangian,
    open_probability,
    ramp,
    shift,
)
from prunekit.training.learned_masks import LearnedMasks

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from prunekit.training.trainer import ParameterGroup

log = logging.getLogger("prunekit")
ConstraintKind = Literal["lagrangian", "exact"]

FAR = 0.02
"""How far masks may be from their target before it is said. The authors are content at 0.005."""


def warn_of_missed(what: str, missed: float, target: float) -> None:
    """Warns of masks that expect another share of `what` to go than the `target`, which goes."""
    if abs(missed) > FAR:
        log.warning(
            "the masks expect %.1f %% of the %s to go, and %.1f %% go: what is left is not what "
            "was trained; pruner.constraint=exact, more pruner.steps or another pruner.mask_lr "
            "bring the two together",
            100 * (target + missed),
            what,
            100 * target,
        )


class Constraint(ABC):
    """What the masks should remove, as a penalty of `train`, or where it is exact before each of
    its steps.
    """

    def __init__(self, masks: LearnedMasks, constraints: int, warmup: int, kind: ConstraintKind):
        """warmup: steps in which the target grows from nothing."""
        self.masks, self.warmup, self.exact = masks, warmup, kind == "exact"
        self.multipliers = nn.Parameter(torch.zeros(constraints, 2, device=masks.log_alpha.device))

    def parameters(self, lr: float) -> list[ParameterGroup]:
        """What `train` trains beside the model, at a constant rate."""
        masks: ParameterGroup = {"params": [self.masks.log_alpha], "lr": lr, "constant": True}
        multipliers: ParameterGroup = {
            "params": [self.multipliers],
            "lr": lr,
            "constant": True,
            "maximize": True,
        }
        return [masks] if self.exact else [masks, multipliers]

    def callbacks(self) -> list[TrainerCallback]:
        """What `train` calls between the steps."""
        from prunekit.training.callbacks import BeforeStep

        return [BeforeStep(self.bring_to_target)] if self.exact else []

    @torch.no_grad()
    def bring_to_target(self, step: int) -> None:
        """Offsets log alpha so that nothing is left of the gaps at this step."""
        self.masks.offset = self.offset(self.masks.log_alpha, ramp(step, self.warmup))

    @abstractmethod
    def gaps(self, share: float) -> list[Tensor]:
        """What is removed less `share` of the target, constraint by constraint."""

    @abstractmethod
    def offset(self, log_alpha: Tensor, share: float) -> Tensor:
        """What log alpha lacks of removing `share` of the target: one number for each target."""

    def __call__(self, model: nn.Module, step: int) -> Tensor:
        """The penalty of a step."""
        if self.exact:
            return self.multipliers.new_zeros(())
        return lagrangian(self.multipliers, self.gaps(ramp(step, self.warmup)))


class KindConstraint(Constraint):
    """Of each kind of unit the same share in every group: Sheared LLaMA's target shape."""

    def __init__(
        self, masks: LearnedMasks, shares: Mapping[str, float], warmup: int, kind: ConstraintKind
    ):
        super().__init__(masks, len(shares), warmup, kind)
        self.shares = shares

    def gaps(self, share: float) -> list[Tensor]:
        closed: dict[str, list[Tensor]] = {kind: [] for kind in self.shares}
        for group, opened in zip(self.masks.groups, self.masks.opened(), strict=True):
            closed[group.kind].append((1 - opened).mean())
        return [torch.stack(closed[kind]) - share * t for kind, t in self.shares.items()]

    def offset(self, log_alpha: Tensor, share: float) -> Tensor:
        def closed(moved: Tensor) -> Tensor:
            return (1 - open_probability(moved)).mean()

        parts = log_alpha.split(self.masks.units)
        moves = [
            shift(a, closed, share * self.shares[g.kind])
            for g, a in zip(self.masks.groups, parts, strict=True)
        ]
        return torch.cat([torch.full_like(a, m) for a, m in zip(parts, moves, strict=True)])

    def missed(self) -> dict[str, float]:
        """By which share of its units each kind is expected to lose too many, on average."""
        gaps = zip(self.shares, self.gaps(1.0), strict=True)
        return {kind: float(gap.detach().mean()) for kind, gap in gaps}


class SizeConstraint(Constraint):
    """A share of the parameters that may go, wherever they are (CoFi, NutePrune, Compresso)."""

    def __init__(
        self, masks: LearnedMasks, removed: int, prunable: int, warmup: int, kind: ConstraintKind
    ):
        super().__init__(masks, 1, warmup, kind)
        self.size = ExpectedSize(masks.model, masks.groups, masks.log_alpha.device)
        self.target, self.prunable = removed / prunable, prunable

    def sparsity(self) -> Tensor:
        """Expected share of the prunable parameters that is gone."""
        return self._gone(self.masks.opened())

    def _gone(self, opened: Sequence[Tensor]) -> Tensor:
        return (self.size.total - self.size(opened)) / self.prunable

    def offset(self, log_alpha: Tensor, share: float) -> Tensor:
        def gone(moved: Tensor) -> Tensor:
            return self._gone(open_probability(moved).split(self.masks.units))

        return torch.full_like(log_alpha, shift(log_alpha, gone, share * self.target))

    def gaps(self, share: float) -> list[Tensor]:
        return [(self.sparsity() - share * self.target)[None].float()]
