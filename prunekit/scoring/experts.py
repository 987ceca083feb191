"""What a pass over the calibration text tells about experts: how often each is picked, with what
weight, and how large its output is.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prunekit.activations import processes
from prunekit.activations.hooks import pass_tokens
from prunekit.errors import ConfigError
from prunekit.graph.expert_neurons import (
    around,
    expert_members,
    expert_numbers,
    expert_slabs,
    module_around,
    unit_of_expert,
)
from prunekit.graph.sample_run import ERRORS
from prunekit.scoring.listed_experts import ListedCall, listed_calls
from prunekit.scoring.traced_experts import traced_calls
from prunekit.types import Group, Run

log = logging.getLogger("prunekit")
ADDED = ("frequency", "weight", "norm", "squared_norm", "weighted_norm")
"""The statistics that are sums over tokens."""


@dataclass
class ExpertStatistics:
    """Six numbers a unit, each (U,) float64, over the tokens routed to its expert (to any of them,
    where a router picks groups first); f is an expert's output before the router's weight g.
    """

    frequency: Tensor
    weight: Tensor
    norm: Tensor
    squared_norm: Tensor
    weighted_norm: Tensor
    maximum: Tensor

    @staticmethod
    def zeros(experts: int, device: torch.device) -> ExpertStatistics:
        # Float32 where a device has no float64 (MPS).
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return ExpertStatistics(
            *(torch.zeros(experts, dtype=dtype, device=device) for _ in range(6))
        )

    def add(self, index: Tensor, weight: Tensor, f: Tensor) -> None:
        """Take in tokens `(T,)` with the expert of each, its weight, and its output `(T, C)`.

        An index beyond the experts (one without weights of its own) and a weight of zero (an
        expert that is skipped) count for none.
        """
        units = len(self.frequency)
        used = (index < units) & (weight != 0)
        where = torch.where(used, index, torch.zeros_like(index))
        f, g = f.float() * used[:, None], weight.to(self.weight.dtype) * used
        norm = f.norm(dim=1).to(self.weight.dtype)
        for total, value in (
            (self.frequency, used.to(norm.dtype)),
            (self.weight, g),
            (self.norm, norm),
            (self.squared_norm, norm.square()),
            (self.weighted_norm, g * norm),
        ):
            total.index_add_(0, where, value)
        largest = f.abs().amax(1).to(self.maximum.dtype)
        self.maximum.scatter_reduce_(0, where, largest, "amax")


class Routed(NamedTuple):
    """One call of experts: of `module`, with for each token `(T, k)` experts and weights among its
    arguments, at the places `at`.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    picks: Tensor
    weight: Tensor
    at: tuple[int | str, int | str]

    def output_of(self, pick: int) -> Tensor:
        """(T, C) what the expert of every token's pick number `pick` puts out, before its
        weight.
        """
        one = torch.ones_like(self.weight[:, :1])
        try:
            found = self._again(self.picks[:, pick : pick + 1], one)
        except ERRORS:  # code that squeezes a single pick away gets all, the others' weights zero
            only = torch.zeros_like(self.weight)
            only[:, pick] = 1
            found = self._again(self.picks, only)
        return found.reshape(len(one), -1)

    def output_by(self, expert: int) -> Tensor:
        """(T, C) what one expert would put out for every token, before a weight."""
        only = torch.zeros_like(self.weight)
        only[:, 0] = 1
        return self._again(torch.full_like(self.picks, expert), only).reshape(len(only), -1)

    def _again(self, picks: Tensor, weight: Tensor) -> Tensor:
        new = dict(zip(self.at, (picks, weight), strict=True))
        args = [new.get(i, a) for i, a in enumerate(self.args)]
        out: Tensor = self.module.forward(
            *args, **{k: new.get(k, v) for k, v in self.kwargs.items()}
        )
        return out


def routed(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Routed | None:
    """A module's call with the routing among its arguments, told by types and shapes: integers
    `(T, k)` and floats of the same shape. None where there is none.
    """
    named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    given = [(k, v) for k, v in named if isinstance(v, Tensor)]
    for at, index in given:
        if index.dim() != 2 or index.dtype not in (torch.int64, torch.int32):
            continue
        for place, weight in given:
            if weight.is_floating_point() and weight.shape == index.shape:
                return Routed(module, args, kwargs, index, weight, (at, place))
    return None


def check_experts(groups: Sequence[Group]) -> None:
    """Raises ConfigError for groups of another kind."""
    other = next((g for g in groups if g.kind != "experts"), None)
    if other is not None:
        raise ConfigError(f"this scores experts, and {other.name} is of kind {other.kind}")


def expert_parents(model: nn.Module, group: Group) -> list[str]:
    """The modules around an expert group's weights, the innermost first."""
    slabs = [m.param for m in expert_slabs(model, group)]
    names = [n.rpartition(".")[0] for n in slabs or [m.param for m in group.members]]
    return around(names[-1])


def _calls_inside(
    model: nn.Module, group: Group, module: nn.Module, args: Any, kwargs: Mapping[str, Any]
) -> list[ListedCall]:
    """The calls of a group's experts inside `module`, with the unit of each in the expert's
    place.
    """
    if group.modules:
        return listed_calls(model, group, module, args, kwargs)
    unit = unit_of_expert(expert_numbers(model, group)).tolist()
    calls = traced_calls(model, expert_members(model, group), module, args, kwargs)
    return [c._replace(expert=unit[c.expert]) for c in calls]


@contextmanager
def watch_experts(
    model: nn.Module, groups: Sequence[Group]
) -> Iterator[dict[str, ExpertStatistics]]:
    """Inside, every call of the groups' experts adds to their statistics, which come out by name;
    a group whose experts' outputs and weights cannot be had gets none.

    An expert's output is had by calling the experts again with one pick a token and a weight of
    one: as much work as the call itself. Experts that are not called with a routing are watched
    inside the innermost module around them and their router, which is called again.
    """
    found: dict[str, ExpertStatistics] = {}
    owner: dict[str, str] = {}
    again: list[str] = []  # the module that is being called again
    units = {g.name: unit_of_expert(expert_numbers(model, g)) for g in groups}

    def after(group: Group, path: str) -> Any:
        def see(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            call = routed(module, args, kwargs)
            if call is None or again or owner.setdefault(group.name, path) != path:
                return
            if group.name not in found:
                found[group.name] = ExpertStatistics.zeros(group.units, call.picks.device)
            unit = units[group.name].to(call.picks.device)
            for pick in range(call.picks.shape[1]):
                f = call.output_of(pick)
                index = call.picks[:, pick]
                known = unit[index.clamp(max=len(unit) - 1)]
                # Experts without weights of their own come after the others, and count for none.
                unit_at = torch.where(index < len(unit), known, group.units)
                found[group.name].add(unit_at, call.weight[:, pick], f)

        return see

    def after_all(group: Group, path: str) -> Any:
        def see(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if again or owner.setdefault(group.name, path) != path:
                return
            again.append(path)
            calls = _calls_inside(model, group, module, args, kwargs)
            again.clear()
            for unit, f, g in calls:
                if group.name not in found:
                    found[group.name] = ExpertStatistics.zeros(group.units, f.device)
                found[group.name].add(torch.full_like(g, unit, dtype=torch.int64), g, f)

        return see

    watched = [(path, after(g, path)) for g in groups for path in expert_parents(model, g)]
    watched += [(p, after_all(g, f"around {p}")) for g in groups for p in around(module_around(g))]
    hooks = [
        model.get_submodule(path).register_forward_hook(see, with_kwargs=True)
        for path, see in watched
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def expert_statistics(
    model: nn.Module, groups: Sequence[Group], run: Run
) -> dict[str, ExpertStatistics]:
    """By group the statistics of its experts over the calibration text: one pass, none for what
    this run has seen. Says how many experts no token reached.

    Raises ConfigError for groups of other kinds, and for experts that are neither called with their
    routing nor followed in the code around them.
    """
    check_experts(groups)
    missing = [g for g in groups if ("experts", g.name) not in run.statistics]
    if missing:
        with watch_experts(model, missing) as found:
            pass_tokens(processes.own_part(run), "experts")
        for g in missing:
            if g.name not in found:
                raise ConfigError(
                    f"{g.name} of {type(model).__name__}: its experts are not called with the "
                    "experts and weights of each token, nor can its code be followed from their "
                    "weights to the output; take criterion=aimer or l2, which read weights alone"
                )
            sums = found[g.name]
            processes.add_up([getattr(sums, name) for name in ADDED])
            processes.add_up([sums.maximum], largest=True)
            run.statistics["experts", g.name] = sums
        _say_coverage(missing, found)
    return {g.name: run.statistics["experts", g.name] for g in groups}


def expert_coverage(run: Run) -> dict[str, dict[str, int]]:
    """By group what this run's statistics of experts rest on, for a pruner's notes: how many units
    no token reached (`unseen`), and the fewest tokens of one (`fewest`). Empty where none were
    taken.
    """
    seen = {
        key[1]: s.frequency
        for key, s in run.statistics.items()
        if isinstance(s, ExpertStatistics) and isinstance(key, tuple)
    }
    return {
        name: {"unseen": int((n == 0).sum()), "fewest": int(n.min())} for name, n in seen.items()
    }


def _say_coverage(groups: Sequence[Group], found: Mapping[str, ExpertStatistics]) -> None:
    seen = {g.name: found[g.name].frequency for g in groups}
    idle = {name: int((n == 0).sum()) for name, n in seen.items()}
    fewest = min(int(n.min()) for n in seen.values())
    if any(idle.values()):
        log.warning(
            "%d of %d experts got no calibration token (%s); they score 0 and go first: take more "
            "text",
            sum(idle.values()),
            sum(g.units for g in groups),
            ", ".join(f"{name}: {n}" for name, n in idle.items() if n),
        )
    else:
        log.info("every expert got calibration tokens, %d at least", fewest)
