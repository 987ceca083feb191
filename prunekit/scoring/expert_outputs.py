"""What every expert puts out for every token, routed to it or not: how alike experts are.

As much work as all experts of a layer on all of the text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit.activations.hooks import first_tensor, pass_tokens
from prunekit.errors import ConfigError
from prunekit.graph.expert_neurons import expert_numbers, expert_slabs
from prunekit.scoring.experts import expert_parents, routed
from prunekit.types import Group, Run, tensor_of


@dataclass
class ExpertOutputs:
    """Sums over T tokens, of E experts.

    Attributes:
        total: (E, C) of the outputs, before the router's weight.
        cosine: (E, E) of the cosines between two experts' outputs for one token.
        routing: (E, E) products of the router's logits: how alike two experts are asked for.
    """

    experts: int
    tokens: int = 0
    total: Tensor = field(default_factory=lambda: torch.zeros(()))
    cosine: Tensor = field(default_factory=lambda: torch.zeros(()))
    routing: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, outputs: Tensor, logits: Tensor) -> None:
        """Take in `outputs (E, T, C)` and router logits `(T, E)`."""
        direction = F.normalize(outputs.float(), dim=-1)
        z = logits.float()
        self.tokens += outputs.shape[1]
        self.total = self.total.to(z.device) + outputs.float().sum(1)
        self.cosine = self.cosine.to(z.device) + torch.einsum("itc,jtc->ij", direction, direction)
        self.routing = self.routing.to(z.device) + z.T @ z

    @property
    def mean(self) -> Tensor:
        """(E, C) float64 on the CPU."""
        return (self.total / self.tokens).double().cpu()

    def similarity(self) -> Tensor:
        """(E, E) in [0, 1], float64 on the CPU: the mean of how alike outputs and the router's
        logits are, as REAM takes it.
        """
        outputs = (self.cosine / self.tokens).double().cpu() / 2 + 0.5
        routing = self.routing.double().cpu()
        length = routing.diagonal().sqrt().clamp(min=1e-12)  # a row of zeros asks for nothing
        distance = (2 - 2 * routing / length[:, None] / length).clamp(min=0).sqrt()
        distance.fill_diagonal_(0)
        alike = 1 - distance / distance.max().clamp(min=1e-12)
        return (outputs + alike) / 2


def router_weight(model: nn.Module, group: Group) -> str:
    """The name of the matrix `(E, C)` of which each row asks for one expert. Raises ConfigError
    where there is none.
    """
    slabs = expert_slabs(model, group)
    for m in group.members:
        if m not in slabs and m.axis == 0 and tensor_of(model, m.param).dim() == 2:
            return m.param
    raise ConfigError(f"{group.name} of {type(model).__name__} has no router's matrix")


@torch.no_grad()
def expert_outputs(model: nn.Module, group: Group, run: Run) -> ExpertOutputs:
    """One pass of the text with all experts of `group` run on all tokens.

    Experts of a list are run on what the router reads. Raises ConfigError where experts in one
    tensor are not called with the routing of each token, where the router reads something else than
    its matrix takes, and for experts of a list that read something else than the router.
    """
    name = router_weight(model, group)
    router = model.get_submodule(name.rpartition(".")[0])
    found = ExpertOutputs(expert_numbers(model, group).numel())
    given: list[Tensor] = []
    owner: list[str] = []

    def ask(module: nn.Module, args: Any, kwargs: Any) -> None:
        given[:] = [first_tensor(args, kwargs)]

    def see(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            call = routed(module, args, kwargs)
            if call is None or (owner and owner[0] != path):
                return
            owner[:] = [path]
            outputs = torch.stack([call.output_by(e) for e in range(found.experts)])
            found.add(outputs, _logits(model, name, given))

        return hook

    hooks = [router.register_forward_pre_hook(ask, with_kwargs=True)]
    if group.modules:
        hooks += _watch_list(model, group, router, name, found)
    hooks += [
        model.get_submodule(path).register_forward_hook(see(path), with_kwargs=True)
        for path in expert_parents(model, group)
    ]
    try:
        pass_tokens(run, "all experts")
    finally:
        for h in hooks:
            h.remove()
    if not found.tokens:
        raise ConfigError(
            f"{group.name} of {type(model).__name__}: its experts are not called with the experts "
            "and weights of each token, so they cannot be run one by one"
        )
    return found


def _watch_list(
    model: nn.Module, group: Group, router: nn.Module, name: str, found: ExpertOutputs
) -> list[Any]:
    """Hooks by which all experts of a list are run on what the router is given."""
    given: list[Tensor] = []

    def see(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        x = first_tensor(args, kwargs)
        given[:] = [x.reshape(-1, x.shape[-1])]
        experts = [model.get_submodule(path) for path in group.modules]
        outputs = [first_tensor(e.forward(given[0])).reshape(len(given[0]), -1) for e in experts]
        found.add(torch.stack(outputs), _logits(model, name, given))

    hooks: list[Any] = [router.register_forward_hook(see, with_kwargs=True)]
    for path in group.modules:
        check = partial(_check_read, path, given)
        hooks.append(model.get_submodule(path).register_forward_pre_hook(check, with_kwargs=True))
    return hooks


def _check_read(path: str, given: list[Tensor], module: nn.Module, args: Any, kwargs: Any) -> None:
    """Raises ConfigError where the first token of an expert is none of those that the router
    read.
    """
    x = first_tensor(args, kwargs)
    first = x.reshape(-1, x.shape[-1])[:1]
    same = given and given[0].shape[1] == first.shape[1]
    if len(first) and not (same and bool((given[0] == first).all(1).any())):
        raise ConfigError(f"{path} reads something else than its router: it cannot be merged")


def _logits(model: nn.Module, name: str, given: list[Tensor]) -> Tensor:
    weight = tensor_of(model, name)
    if not given or given[0].shape[-1] != weight.shape[1]:
        raise ConfigError(f"{name} does not read what its module is given")
    bias = getattr(model.get_submodule(name.rpartition(".")[0]), "bias", None)
    logits = given[0].reshape(-1, weight.shape[1]).float() @ weight.float().T
    return logits if bias is None else logits + bias.float()
