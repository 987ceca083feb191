"""Gates that stay: z multiplied into the parameters, so that the model alone computes what `gated`
made of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from prunekit.architecture.blocks import block_names
from prunekit.errors import ConfigError
from prunekit.graph.discovery import discovery
from prunekit.graph.gate_hooks import norm_style
from prunekit.graph.gate_places import Site, find_places, writers_of
from prunekit.graph.groups import Candidate
from prunekit.graph.norms import style_of
from prunekit.graph.slicing import holders
from prunekit.types import Group, Member, tensor_of


def block_parts(model: nn.Module, group: Group) -> list[Group]:
    """A group of one unit for every block of `group`: the tensors by which the block writes into
    the residual stream, gated together.

    Where z = 0 the block adds nothing; unlike the gate of a whole block any other z can be folded.
    Raises ConfigError for a block of which no writer is known.
    """
    hidden = [c for c in discovery(model).candidates if c.group.kind == "hidden"]
    parts = []
    for path in group.modules:
        written = [m for c in hidden for m in _writers(model, c) if m.param.startswith(path + ".")]
        if not written:
            raise ConfigError(f"what {path} adds to the residual stream is not known")
        members = tuple(_whole(model, m) for m in written)
        parts.append(
            Group(f"{group.name}/{path}", "inner", group.layer, 1, members, whole=group.name)
        )
    return parts


def _writers(model: nn.Module, candidate: Candidate) -> Iterator[Member]:
    """An embedding writes, also where the head shares it and reads."""
    norms = set(candidate.norms)
    for m in candidate.group.members:
        owner = m.param.rpartition(".")[0]
        embeds = isinstance(model.get_submodule(owner), nn.Embedding)
        if embeds or (not m.reads and owner not in norms):
            yield m


def _whole(model: nn.Module, member: Member) -> Member:
    size = tensor_of(model, member.param).shape[member.axis]
    return dataclasses.replace(member, index=torch.arange(size)[None])


@torch.no_grad()
def fold(model: nn.Module, groups: Sequence[Group], z: Mapping[str, Tensor]) -> nn.Module:
    """Multiplies parameters by the z of their units, in place, so that the model computes what
    `gated(model, groups, z)` does.

    Units whose z is 0 are left as they are: `zero` or `remove` takes them (residual channels with
    `norm="rescale"`). A head tied to the embedding is made up for at the norm before it. Raises
    ConfigError for groups of kind `blocks` (gate their `block_parts`) and `weights`, and where a
    LayerNorm averages over residual channels: there no parameters do it.
    """
    found = discovery(model)
    known = {c.group.name: c for c in found.candidates}
    written = writers_of(found.candidates)
    by_name = {g.name: g for g in groups}
    for name, value in z.items():
        group = by_name[name]
        soft = torch.where(value == 0, 1.0, value.float())
        if bool((soft == 1).all()):
            continue
        if group.whole:
            _multiply(Site(model, group, soft), group.members)
            continue
        if name not in known:
            raise ConfigError(f"{name}: gates of kind {group.kind} cannot be folded into weights")
        if not found.places:
            found.places.update(find_places(model))
        candidate = known[name]
        place = found.places[candidate.pattern].place
        site = Site(model, candidate.group, soft, candidate.norms, written)
        if place == "readers":
            _multiply(site, [m for m in group.members if m.reads])
        elif place == "writers":
            _fold_stream(site, candidate)
        elif place == "members":
            _multiply(site, group.members)
        else:
            _fold_experts(site)
    return model


def _multiply(site: Site, members: Sequence[Member]) -> None:
    for m in members:
        tensor = tensor_of(site.model, m.param)
        tensor.mul_(site.scale(m)(tensor, m.axis))


def _fold_experts(site: Site) -> None:
    """What each expert adds to the stream; of experts in a list, by the writers inside of each."""
    _multiply(site, [m for m in site.group.members if m.param in site.into_stream])
    for u, path in enumerate(site.group.modules):
        for name in site.into_stream:
            if name.startswith(path + "."):
                tensor_of(site.model, name).mul_(site.z[u])


def _fold_stream(site: Site, candidate: Candidate) -> None:
    """Residual channels, at all that writes them."""
    check_foldable(site.model, [candidate])
    written = list(_writers(site.model, candidate))
    _multiply(site, written)
    where = holders(site.model)
    for m in written:
        held = where[id(tensor_of(site.model, m.param))]
        embeds = [module for module, _, _ in held if isinstance(module, nn.Embedding)]
        if embeds and len(embeds) < len(held):
            _make_up(site, candidate, m)


def check_foldable(model: nn.Module, candidates: Sequence[Candidate]) -> None:
    """Raises ConfigError where a norm that is no RMSNorm averages over the units: gates between 0
    and 1 cannot be folded into it.
    """
    known: dict[tuple[type, int], bool] = {}
    for candidate in candidates:
        for path in candidate.norms:
            norm = model.get_submodule(path)
            width = len(next(norm.parameters(), torch.empty(0)))
            key = (type(norm), width)
            known[key] = known[key] if key in known else _is_rms_norm(norm, width)
            if not known[key]:
                raise ConfigError(
                    f"{candidate.group.name}: {path} ({type(norm).__name__}) averages over the "
                    "units, and gates between 0 and 1 cannot be folded into it; leave out kind "
                    f"{candidate.group.kind}"
                )


def check_channels(model: nn.Module, groups: Sequence[Group]) -> None:
    """Raises ConfigError where gates of these groups could not be folded, as `check_foldable`."""
    names = {g.name for g in groups}
    check_foldable(model, [c for c in discovery(model).candidates if c.group.name in names])


def _is_rms_norm(norm: nn.Module, width: int) -> bool:
    style = norm_style(norm, width)
    return style is not None and not style.centres


def _gain_style(norm: nn.Module) -> bool:
    """Whether the gain is `1 + weight`."""
    gain = norm.get_parameter("weight")
    offset, _ = style_of(norm, "weight", {"weight": {0: torch.arange(len(gain) // 2)}})
    return offset


def _make_up(site: Site, candidate: Candidate, tied: Member) -> None:
    """The head that shares the embedding was multiplied with it: the norm before it divides."""
    blocks = tuple(name + "." for name in block_names(site.model))
    last = [path for path in candidate.norms if not path.startswith(blocks)]
    if len(last) != 1:
        raise ConfigError(
            f"{tied.param} is the head's weight too, and not one norm stands before the head "
            f"({', '.join(last) or 'none'}): gates between 0 and 1 cannot be folded"
        )
    norm = site.model.get_submodule(last[0])
    offset = float(_gain_style(norm))
    gain = norm.get_parameter("weight")
    own = next(m for m in site.group.members if m.param == f"{last[0]}.weight")
    gain.copy_((gain + offset) / site.scale(own)(gain, 0) - offset)
