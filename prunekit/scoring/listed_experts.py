"""Experts that are modules of a list, called one after the other by code that need not hand its
routing to anybody: what each puts out, and with what weight that is added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prunekit.activations import processes
from prunekit.activations.hooks import first_tensor, hook_activations, pass_tokens
from prunekit.architecture.linear import Reader, readers, weight_of
from prunekit.errors import ConfigError
from prunekit.graph.expert_neurons import module_around
from prunekit.types import Group, Run

ALIKE = 1e-3
"""How far, of the largest, the derivatives by the channels of one output may be apart."""


class ListedCall(NamedTuple):
    """One expert's tokens: their outputs `f (T, C)` and the router's weights `g (T,)`."""

    expert: int
    f: Tensor
    g: Tensor


@dataclass(frozen=True, eq=False)
class LoneNeurons:
    """Neurons that one expert has for itself: `neurons` of one of a list of `experts`, or of a
    shared expert, which all tokens reach (None).
    """

    neurons: Group
    experts: Group | None


def lone_neurons(groups: Sequence[Group], shared: bool) -> list[LoneNeurons]:
    """Of all `groups` of a model the neurons that one expert of a list has for itself, and where
    `shared` those of shared experts: in the same block, outside of the routed ones.
    """
    found = []
    experts = [g for g in groups if g.kind == "experts"]
    stacked, layers = {m.param for g in experts for m in g.members}, {g.layer for g in experts}
    for g in (g for g in groups if g.kind == "neurons"):
        path = g.members[0].param
        home = [e for e in experts if any(path.startswith(f"{one}.") for one in e.modules)]
        if home:
            found.append(LoneNeurons(g, home[0]))
        elif shared and g.layer in layers - {None} and g.members[0].param not in stacked:
            found.append(LoneNeurons(g, None))
    return found


def lone_reader(model: nn.Module, lone: LoneNeurons) -> Reader:
    """The linear module that reads the neurons. Raises ConfigError where there is no single one."""
    found = readers(model, lone.neurons)
    if len(found) != 1:
        raise ConfigError(f"no single linear module reads {lone.neurons.name}: take score=taylor")
    return found[0]


@contextmanager
def watch_linear(
    model: nn.Module,
    names: Mapping[str, Group | None],
    see: Callable[[str, Tensor | None, Tensor], None],
) -> Iterator[None]:
    """Inside, `see` is shown for linear modules, by name, what they read `(T, C)` and the router's
    weights `(T,)`: of a module inside one of a list of experts, the group of which is given, and
    of others None.

    Raises ConfigError at the end for lists whose routing could not be had.
    """
    lists = {g.name: g for g in names.values() if g is not None}
    seen, again = set[str](), [False]

    def around(group: Group) -> Any:
        mine = [n for n, g in names.items() if g is not None and g.name == group.name]

        def shown(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            inputs: dict[str, Tensor] = {}
            keep = {n: partial(inputs.__setitem__, n) for n in mine}
            again[0] = True
            with hook_activations(model, inputs=keep):
                calls = listed_calls(model, group, module, args, kwargs)
            again[0] = False
            for call in calls:
                seen.add(group.name)
                for name, x in inputs.items():
                    if name.startswith(group.modules[call.expert] + "."):
                        see(name, call.g, x.reshape(len(call.g), -1))

        return shown

    def first_time(name: str, x: Tensor) -> None:
        if not again[0]:
            see(name, None, x.reshape(-1, x.shape[-1]))

    everywhere = {n: partial(first_time, n) for n, g in names.items() if g is None}
    hooks = [
        model.get_submodule(module_around(g)).register_forward_hook(around(g), with_kwargs=True)
        for g in lists.values()
    ]
    try:
        with hook_activations(model, inputs=everywhere):
            yield
    finally:
        for hook in hooks:
            hook.remove()
    if lost := sorted(lists.keys() - seen):
        raise ConfigError(
            f"{lost[0]} of {type(model).__name__}: its output is no sum of its experts' with a "
            "weight for each token, so what they read cannot be told apart"
        )


@torch.no_grad()
def linear_squares(
    model: nn.Module, names: Mapping[str, Group | None], run: Run, weighted: bool
) -> dict[str, Tensor]:
    """By linear module (C,) float32, the sums of squares of what it reads, from one pass; inside
    experts of a list each token counts times the square of its router's weight where `weighted`.

    Zeros for a module that no token reached.
    """
    found = {
        n: torch.zeros(w.shape[1], device=w.device)
        for n in names
        for w in [weight_of(model.get_submodule(n))]
    }

    def see(name: str, g: Tensor | None, x: Tensor) -> None:
        square = x.float().square()
        if g is not None:
            square = square * (g.float().square() if weighted else (g != 0).float())[:, None]
        found[name] += square.sum(0)

    with watch_linear(model, names, see):
        pass_tokens(processes.own_part(run), "inside experts")
    processes.add_up(list(found.values()))
    return found


def listed_calls(
    model: nn.Module, group: Group, module: nn.Module, args: Any, kwargs: Mapping[str, Any]
) -> list[ListedCall]:
    """Calls `module`, which holds the router and the experts of `group`, again with the same
    arguments. Empty where its output is no sum of its experts' with a weight for each token.

    The derivative of the sum of its output by what an expert puts out is the weight, whatever code
    computes it.
    """
    outputs: dict[int, Tensor] = {}

    def cut(expert: int) -> Any:
        def hook(m: nn.Module, a: Any, out: Any) -> Any:
            if not isinstance(out, Tensor):
                return None
            outputs[expert] = out.detach().requires_grad_()
            return outputs[expert]

        return hook

    hooks = [
        model.get_submodule(path).register_forward_hook(cut(e))
        for e, path in enumerate(group.modules)
    ]
    try:
        with torch.enable_grad():
            total = first_tensor(module.forward(*args, **kwargs)).float().sum()
    finally:
        for hook in hooks:
            hook.remove()
    return weighed(total, list(outputs.items()))


def weighed(total: Tensor, outputs: Sequence[tuple[int, Tensor]]) -> list[ListedCall]:
    """The outputs of experts with their weights in a sum over tokens and channels. Empty where the
    channels of a token have not all the same.
    """
    if not total.requires_grad or not outputs:
        return []
    slopes = torch.autograd.grad(total, [f for _, f in outputs], allow_unused=True)
    found, apart = [], []
    for (expert, f), slope in zip(outputs, slopes, strict=True):
        if slope is None or not slope.numel():
            continue
        slope = slope.reshape(-1, slope.shape[-1]).float()
        off = (slope - slope[:, :1]).abs().max().double()
        apart.append((off > ALIKE * slope.abs().max().double()).to(total.device))
        found.append(ListedCall(expert, f.detach().reshape(slope.shape), slope[:, 0]))
    if apart and bool(torch.stack(apart).any()):  # one wait for all experts
        return []
    return found
