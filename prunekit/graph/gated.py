"""A differentiable, reversible mask on units: for learned masks (Sheared LLaMA, NutePrune),
forward-only perturbation (Bonsai) and search.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

from prunekit.errors import ConfigError
from prunekit.graph.discovery import Discovery, discovery
from prunekit.graph.gate_hooks import BlockGate, Hooks
from prunekit.graph.gate_places import Site, find_places, install, writers_of
from prunekit.types import Group


@contextmanager
def gated(
    model: nn.Module,
    groups: Sequence[Group],
    z: Mapping[str, Tensor],
    known: Discovery | None = None,
) -> Iterator[nn.Module]:
    """Inside, every forward of the model multiplies each unit's contribution by its z, to which
    gradients flow; parameters stay as they are, and on exit everything comes off.

    `z[name]` has the shape of the group `name`, with values in [0, 1]; a group left out keeps its
    units. All of z at 1 is the model itself, and zeros give what `zero` gives:

    neurons, heads, inner: what the modules that read the units (`down_proj`, `o_proj`) are given is
        multiplied. Where the units pass a norm on the way there (ranks of MLA), as `hidden`.
    hidden: what embeddings and writers (`o_proj`, `down_proj`) put into the stream is multiplied;
        of what a LayerNorm puts out, the part that is not the channel's own (mean and bias).
    blocks: `input + z (block(input) - input)`.
    experts: z = 0 takes the expert out of the routing, as `remove` does: its router logit is the
        lowest there is, others share its probability. Any other z leaves the routing as it is and
        multiplies what the expert adds to the stream. At z = 0 the gradient is therefore 0. So many
        as a token picks must stay above 0.
    weights: each element of the matrix is multiplied; gradients flow to z and to the weight.

    Where an architecture does not allow this (found by trying it once on a small version of the
    model) every tensor of the unit is multiplied instead: the same at 0 and 1, a power of z between
    them. `known` as for `remove`.

    Raises ConfigError for an unknown group, a z of the wrong shape or type, and experts whose
    router is not understood.
    """
    by_name = _checked(groups, z)
    sites = [
        (by_name[name], value)
        for name, value in z.items()
        if by_name[name].kind not in ("blocks", "weights")
    ]
    hooks = Hooks(model)
    try:
        if sites:
            _gate_slices(hooks, model, sites, known or discovery(model))
        for name, value in z.items():
            if by_name[name].kind == "weights":
                hooks.replace(by_name[name].matrix, partial(_times, value))
            elif by_name[name].kind == "blocks":
                for u, path in enumerate(by_name[name].modules):
                    hooks.around(model.get_submodule(path), BlockGate(value[u]))
        yield model
    finally:
        hooks.remove()


def _checked(groups: Sequence[Group], z: Mapping[str, Tensor]) -> dict[str, Group]:
    by_name = {g.name: g for g in groups}
    for name, value in z.items():
        if name not in by_name:
            raise ConfigError(
                f"no group called {name!r}. There are: {', '.join(by_name) or 'none'}"
            )
        shape = by_name[name].shape
        if not value.is_floating_point() or tuple(value.shape) != shape:
            raise ConfigError(
                f"z[{name!r}] must be a floating-point tensor of shape {shape}, got {value.dtype} "
                f"{tuple(value.shape)}"
            )
    return by_name


def _gate_slices(
    hooks: Hooks, model: nn.Module, gates: Sequence[tuple[Group, Tensor]], found: Discovery
) -> None:
    """Units that are slices of tensors. Raises ConfigError for a group that the model has not."""
    known = {c.group.name: c for c in found.candidates}
    written = writers_of(found.candidates)
    for group, z in gates:
        if group.whole:
            install(hooks, Site(model, group, z), "members")
            continue
        candidate = known.get(group.name)
        if candidate is None or candidate.group.units != group.units:
            raise ConfigError(
                f"{type(model).__name__} has no group {group.name} of {group.units} units. There "
                f"are: {', '.join(f'{n} ({c.group.units})' for n, c in known.items()) or 'none'}"
            )
        if not found.places:
            found.places.update(find_places(model))
        place, reason = found.places.get(candidate.pattern, (None, "no such units were tried"))
        if place is None:
            raise ConfigError(f"{group.name} of {type(model).__name__} cannot be gated: {reason}")
        install(hooks, Site(model, candidate.group, z, candidate.norms, written), place)


def _times(z: Tensor, weight: Tensor) -> Tensor:
    return weight * z.to(weight.device, weight.dtype)
