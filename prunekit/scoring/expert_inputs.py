"""What each expert reads and what its neurons put out on the tokens that are routed to it, of
experts that lie together in one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.activations import processes
from prunekit.activations.hooks import first_tensor, pass_tokens
from prunekit.errors import ConfigError
from prunekit.graph.expert_neurons import (
    neuron_members,
    neurons_inside,
    places,
    single_experts,
)
from prunekit.scoring.experts import Routed, expert_parents, routed
from prunekit.types import Group, Member, Run


@dataclass(frozen=True, eq=False)
class FusedExperts:
    """Experts in tensors of three axes, or stacked in two, with the neurons that they share.

    Attributes:
        group: of the experts.
        slabs: where they are, an expert a row.
        neurons: unit u is neuron u of every expert.
    """

    group: Group
    slabs: tuple[Member, ...]
    neurons: Group

    @property
    def experts(self) -> int:
        return len(self.slabs[0].index)

    @property
    def pairs(self) -> list[tuple[Member, Member]]:
        """Of each tensor: which slices are an expert's, and which are a neuron's."""
        return list(neuron_members(self.slabs, self.neurons))

    @property
    def writer(self) -> tuple[Member, Member]:
        """The tensor that reads the neurons (`down_proj`)."""
        return next((s, m) for s, m in self.pairs if m.reads)


def fused_experts(model: nn.Module, groups: Sequence[Group]) -> list[FusedExperts]:
    """The experts among all `groups` of a model whose neurons have one index together."""
    found = []
    for g in groups:
        if g.kind != "experts" or g.modules:
            continue
        slabs = tuple(single_experts(model, g))
        neurons = neurons_inside(groups, slabs)
        if neurons is not None and any(m.reads for m in neurons.members):
            found.append(FusedExperts(g, slabs, neurons))
    return found


@dataclass
class ExpertInputs:
    """Sums over the tokens that are routed to an expert, float32.

    Attributes:
        tokens: (E,) how many.
        entering: (E, C) of squares of what the expert reads.
        inside: (E, F) of squares of what its neurons put out, where `down_proj` reads them.
    """

    tokens: Tensor
    entering: Tensor
    inside: Tensor

    def add(self, index: Tensor, weight: Tensor, x: Tensor, a: Tensor) -> None:
        """Take in tokens `(T,)` with the expert of each and the weight of its square, its input
        `(T, C)` and its neurons `(T, F)`.
        """
        used = (index < len(self.tokens)) & (weight != 0)
        where = torch.where(used, index, torch.zeros_like(index))
        self.tokens.index_add_(0, where, used.float())
        scale = (weight.float() * used)[:, None]
        self.entering.index_add_(0, where, x.float().square() * scale)
        self.inside.index_add_(0, where, a.float().square() * scale)


Sees = Callable[[FusedExperts, Tensor, Tensor, Tensor, Tensor], None]
"""(experts, the expert of each token `(T,)`, its router's weight `(T,)`, what it reads `(T, C)`,
what its neurons put out `(T, F)`)."""


@torch.no_grad()
def expert_inputs(
    model: nn.Module, fused: Sequence[FusedExperts], run: Run, weighted: bool
) -> dict[str, ExpertInputs]:
    """By the experts' group, from one pass; none for what this run has seen.

    weighted: what an expert reads and puts out counts times the router's weight (MoE-Pruner), the
        one that the module multiplies with.

    Raises ConfigError where experts are not called with the routing of each token.
    """
    found: dict[str, ExpertInputs] = {}

    def see(f: FusedExperts, index: Tensor, g: Tensor, x: Tensor, a: Tensor) -> None:
        if f.group.name not in found:
            sizes = [(), (x.shape[1],), (f.neurons.units,)]
            zeros = (torch.zeros(f.experts, *s, device=x.device) for s in sizes)
            found[f.group.name] = ExpertInputs(*zeros)
        square = g.float().square() if weighted else (g != 0).float()
        found[f.group.name].add(index, square, x, a)

    missing = [f for f in fused if ("expert inputs", f.group.name, weighted) not in run.statistics]
    if missing:
        with watch_fused(model, missing, see):
            pass_tokens(processes.own_part(run), "inside experts")
        for f in missing:
            sums = found[f.group.name]
            processes.add_up([sums.tokens, sums.entering, sums.inside])
            run.statistics["expert inputs", f.group.name, weighted] = sums
    return {f.group.name: run.statistics["expert inputs", f.group.name, weighted] for f in fused}


@contextmanager
def watch_fused(model: nn.Module, fused: Sequence[FusedExperts], see: Sees) -> Iterator[None]:
    """Inside, every call of the experts is shown to `see`, once for each pick of a token.

    A neuron's output is had by calling the experts again with ones in the place of `down_proj`.
    Raises ConfigError at the end for experts that were not called with the routing of each token.
    """
    owner: dict[str, str] = {}

    def after(f: FusedExperts, path: str) -> Any:
        def shown(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            call, name = routed(module, args, kwargs), f.group.name
            if call is None or owner.setdefault(name, path) != path:
                return
            x = first_tensor(args, kwargs)
            x = x.reshape(-1, x.shape[-1])
            for pick in range(call.picks.shape[1]):
                a = neuron_outputs(model, f, call, pick)
                see(f, call.picks[:, pick], call.weight[:, pick], x, a)

        return shown

    hooks = [
        model.get_submodule(path).register_forward_hook(after(f, path), with_kwargs=True)
        for f in fused
        for path in expert_parents(model, f.group)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    lost = next((f.group.name for f in fused if f.group.name not in owner), None)
    if lost is not None:
        raise ConfigError(
            f"{lost} of {type(model).__name__}: its experts are not called with the experts and "
            "weights of each token, so what they read cannot be told apart; take score=taylor or "
            "magnitude of pruner=expert_neurons, without refit"
        )


def neuron_outputs(model: nn.Module, f: FusedExperts, call: Routed, pick: int) -> Tensor:
    """(T, F) what the neurons of every token's pick number `pick` put out."""
    slab, neurons = f.writer
    path, _, leaf = slab.param.rpartition(".")
    holder = model.get_submodule(path)
    own = holder._parameters[leaf]
    assert own is not None

    def with_ones(value: Tensor) -> Tensor:
        holder._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        return call.output_of(pick)

    try:
        none = with_ones(torch.zeros_like(own))  # its biases
        at_once = none.shape[1]
        parts = []
        for start in range(0, f.neurons.units, at_once):
            which = range(start, min(start + at_once, f.neurons.units))
            parts.append((with_ones(_ones(own, slab, neurons, which)) - none)[:, : len(which)])
    finally:
        holder._parameters[leaf] = own
    return torch.cat(parts, 1)


def _ones(own: Tensor, slab: Member, neurons: Member, which: range) -> Tensor:
    """Weights in the shape of `down_proj` by which every expert puts out its neurons `which`, one a
    channel.
    """
    value = torch.zeros_like(own)
    for e in range(len(slab.index)):
        index = slab.index[e].to(own.device)
        part = value.index_select(slab.axis, index).movedim(neurons.axis, 0)
        flat = torch.zeros_like(part).reshape(len(part), -1)
        at = places(slab, neurons, e)[which.start : which.stop, 0].to(own.device)
        flat[at, torch.arange(len(which), device=own.device)] = 1
        value.index_copy_(slab.axis, index, flat.view(part.shape).movedim(0, neurons.axis))
    return value
