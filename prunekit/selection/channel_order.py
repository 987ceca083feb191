"""Input channels of matrices put into the order in which N:M keeps the most (Zhang et al., ICLR
2024, "Plug-and-Play"): folded into what makes the channels where they are free, else gathered
before the matrix.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.architecture.mapped import beside
from prunekit.architecture.matrices import matrix, module_name, to_out_in
from prunekit.checkpoint.remote_code.runtime_modules import Gather, insert
from prunekit.selection.free_channels import FreeChannels, FreeReaders, reorder, reorder_along
from prunekit.selection.permutation import kept_score, permutation
from prunekit.types import Group, Run, Scores

log = logging.getLogger("prunekit")
PASSES = 2
"""Over the places of the runs: a second pass keeps a little more, a third one hardly any."""
RUNS = 1024
"""The most runs among which channels are assigned; the time grows with the cube."""


class ChannelOrder:
    """Orders the channels of a model's matrices, a few matrices at a time.

    `notes` tells by matrix how that was done and the share of the score that N:M keeps, as the
    channels stood and as they stand.
    """

    def __init__(self, model: nn.Module, m: int) -> None:
        self.model, self.m = model, m
        self.free = FreeReaders(model)
        self.notes: dict[str, dict[str, Any]] = {}

    def arrange(
        self, run: Run, groups: list[Group], scores: Scores, keep: dict[str, int]
    ) -> tuple[list[Group], Scores]:
        """The matrices and their scores with the channels in their new order, where that keeps
        more: the module of a matrix that is gathered for has another name.

        keep: how many of each run of m inputs will stay, by matrix.
        """
        ordered = [g for g in groups if 0 < keep[g.name] < self.m]
        for g in ordered:
            self.notes[g.name] = {"order": "kept", "share_before": self._share(g, scores, keep)}
        for g in ordered:
            channels = self.free.of(module_name(g), run, self.m)
            if channels:
                self._fold(g, channels, groups, scores, keep[g.name])
        found = [
            self._gather(g, scores, keep[g.name])
            if g in ordered and self.notes[g.name]["order"] == "kept"
            else g
            for g in groups
        ]
        for g in found:
            if g.name in self.notes:
                self.notes[g.name]["share_after"] = self._share(g, scores, keep)
        return found, scores

    def _share(self, g: Group, scores: Scores, keep: dict[str, int]) -> float:
        s = to_out_in(self.model, g, scores[g.name])
        there = torch.arange(s.shape[1], device=s.device)
        total = float(s.sum(dtype=torch.float64))  # zero of an idle expert
        return kept_score(s, there, keep[g.name], self.m) / total if total else 1.0

    def _best(self, s: Tensor, keep: int) -> Tensor:
        parts = -(-s.shape[1] // (self.m * RUNS))
        return permutation(s, keep, self.m, parts=parts, passes=PASSES)

    def _fold(
        self,
        g: Group,
        channels: list[FreeChannels],
        groups: list[Group],
        scores: Scores,
        keep: int,
    ) -> None:
        """New order of free channels, in the weights and in all scores of them."""
        s = to_out_in(self.model, g, scores[g.name])
        by_param = {h.matrix: h.name for h in groups}
        for c in channels:
            copies = s[:, c.read.T.flatten()].view(len(s), c.read.shape[1], -1)
            order = self._best(copies.flatten(0, 1), keep)
            reorder(self.model, c, order)
            for member in c.members:
                if member.param in by_param:
                    reorder_along(scores[by_param[member.param]], member, order)
        self.notes[g.name]["order"] = "folded"

    def _gather(self, g: Group, scores: Scores, keep: int) -> Group:
        """The matrix behind a gather of its inputs, and its scores, in the best order there is."""
        name = module_name(g)
        module: Any = self.model.get_submodule(name)
        s = to_out_in(self.model, g, scores[g.name])
        order = self._best(s, keep)
        if id(module.weight) in self.free.shared:
            log.warning("%s is used in several places: its channels stay in their order", name)
            return g
        if torch.equal(order, torch.arange(len(order), device=order.device)):
            return g
        W = matrix(self.model, g)
        with torch.device("meta"):
            linear = nn.Linear(W.shape[1], W.shape[0], module.bias is not None)
        new = beside(W.detach()[:, order].contiguous(), W)
        linear.weight = nn.Parameter(new, W.requires_grad)
        linear.bias = module.bias
        insert(self.model, name, Gather.before(linear.train(module.training), order))
        scores[g.name] = s[:, order].contiguous()
        self.notes[g.name]["order"] = "gathered"
        return replace(g, matrix=f"{name}.linear.weight", shape=tuple(W.shape))
