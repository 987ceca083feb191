"""Where a group's units are multiplied by z: where they are read, where they are written, or at
every member; tried on a small model, so that zeros give what zeroing gives.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from prunekit.architecture.linear import is_linear
from prunekit.errors import in_short
from prunekit.graph.discovery import Discovery, find_candidates
from prunekit.graph.gate_hooks import (
    Hooks,
    InputGate,
    NormGate,
    OutputGate,
    RouterGate,
    Scale,
    lowest_where_zero,
)
from prunekit.graph.groups import Candidate, Cut, Pattern
from prunekit.graph.masks import zero_slices
from prunekit.graph.sample_run import ERRORS, inputs_for
from prunekit.graph.small_model import small_version
from prunekit.graph.verification import (
    MOVES,
    TOLERANCE,
    UNMOVED,
    duplicate,
    masked_logits,
    random_cut,
    run,
)
from prunekit.types import Group, Member, tensor_of

Place = Literal["readers", "writers", "members", "router", "router without biases"]
PLACES: tuple[Place, ...] = ("readers", "writers", "members")
EXPERTS: tuple[Place, ...] = ("router", "router without biases")


class Site(NamedTuple):
    """A group in a model, its z, the norms over its units, and the tensors that write into the
    residual stream.
    """

    model: nn.Module
    group: Group
    z: Tensor
    norms: Sequence[str] = ()
    into_stream: frozenset[str] = frozenset()

    def scale(self, member: Member) -> Scale:
        size = tensor_of(self.model, member.param).shape[member.axis]
        return Scale.over(size, member.index, self.z)

    def owner(self, member: Member) -> nn.Module:
        return self.model.get_submodule(member.param.rpartition(".")[0])


def install(hooks: Hooks, site: Site, place: Place) -> bool:
    """Put a group's hooks on; False where the group has no such place."""
    if place == "readers":
        return _at_readers(hooks, site)
    if place == "writers":
        return _at_writers(hooks, site)
    if place == "members":
        for m in site.group.members:
            _multiply(hooks, site, m)
        return True
    return _at_router(hooks, site, biases=place == "router")


def _at_readers(hooks: Hooks, site: Site) -> bool:
    readers = [m for m in site.group.members if m.reads]
    for m in readers:
        if is_linear(site.owner(m)):
            hooks.before(site.owner(m), InputGate(site.scale(m)))
        else:
            _multiply(hooks, site, m)
    return bool(readers)


def _at_writers(hooks: Hooks, site: Site) -> bool:
    linear = {id(site.owner(m)) for m in site.group.members if is_linear(site.owner(m))}
    norms = set(site.norms)
    for m in site.group.members:
        module, leaf = site.owner(m), m.param.rpartition(".")[2]
        if isinstance(module, nn.Embedding):
            hooks.after(module, OutputGate(site.scale(m)))
        elif m.reads or m.param.rpartition(".")[0] in norms:
            continue
        elif id(module) not in linear:
            _multiply(hooks, site, m)
        elif leaf == "weight":
            hooks.after(module, OutputGate(site.scale(m)))
    return all(_at_norm(hooks, site, path) for path in site.norms)


def _at_norm(hooks: Hooks, site: Site, path: str) -> bool:
    """False for a norm that is neither RMSNorm nor LayerNorm."""
    own = [m for m in site.group.members if m.param.rpartition(".")[0] == path]
    index = (own or site.group.members)[0].index
    norm = site.model.get_submodule(path)
    style = hooks.style(norm, index.numel())
    if style is not None and style.centres:
        hooks.after(norm, NormGate(Scale.over(index.numel(), index, site.z), style))
    return style is not None


def _multiply(hooks: Hooks, site: Site, member: Member) -> None:
    scale = site.scale(member)
    hooks.replace(member.param, lambda t: t * scale(t, member.axis))


def _at_router(hooks: Hooks, site: Site, biases: bool) -> bool:
    """Experts of z = 0 cannot be picked; what the others add to the stream is multiplied by z."""
    model, group, z = site.model, site.group, site.z
    shapes = [(m, tensor_of(model, m.param).dim()) for m in group.members]
    router = next((m for m, rank in shapes if rank == 2), None)
    added = [m for m in group.members if m.param in site.into_stream]
    if router is None or not (added or group.modules):
        return False
    name = router.param
    hooks.route(site.owner(router), RouterGate(lambda: tensor_of(model, name), site.scale(router)))
    for m, rank in shapes:
        if biases and rank == 1:
            hooks.replace(m.param, partial(lowest_where_zero, scale=site.scale(m)))
    for m in added:
        _multiply(hooks, site, m)
    for u, path in enumerate(group.modules):
        hooks.after(model.get_submodule(path), OutputGate(z[u].to))
    return True


def writers_of(candidates: Sequence[Candidate]) -> frozenset[str]:
    """Tensors that write into the residual stream."""
    return frozenset(
        m.param
        for c in candidates
        if c.group.kind == "hidden"
        for m in c.group.members
        if not m.reads
    )


# ---- trying


class Found(NamedTuple):
    """Where units of a pattern are multiplied; or None, and why nowhere."""

    place: Place | None
    reason: str = ""


def find_places(model: nn.Module) -> dict[Pattern, Found]:
    """For every pattern of the model's groups the first place at which zeros give what zeroing (of
    experts: removing) gives, tried on a small version of the model.
    """
    small = small_version(model)
    inputs = inputs_for(small)
    _, known = find_candidates(small, each=2)
    by_pattern: dict[Pattern, list[Candidate]] = defaultdict(list)
    for candidate in [o for c in known.candidates for o in (c, *c.alternatives)]:
        by_pattern[candidate.pattern].append(candidate)
    return {p: _try_places(small, inputs, same, known) for p, same in by_pattern.items()}


def _try_places(
    small: nn.Module, inputs: dict[str, Any], same: Sequence[Candidate], known: Discovery
) -> Found:
    routed = same[0].group.kind == "experts"
    try:
        cuts, reference = _reference(small, inputs, same, known.skip, routed)
    except ERRORS as error:
        return Found(None, in_short(error, 100))
    written = writers_of(known.candidates)
    sites = [
        Site(small, c.candidate.group, c.units.mask.float(), c.candidate.norms, written)
        for c in cuts
    ]
    scale, off = max(1.0, float(reference.abs().max())), float("nan")
    for place in EXPERTS if routed else PLACES:
        hooks = Hooks(small)
        try:
            if all([install(hooks, site, place) for site in sites]):
                off = float((run(small, inputs) - reference).abs().max()) / scale
                if off < TOLERANCE:
                    return Found(place)
        except ERRORS:
            continue
        finally:
            hooks.remove()
    return Found(None, f"zeros differ from {'removing' if routed else 'zeroing'} by {off:.1e}")


def _reference(
    small: nn.Module,
    inputs: dict[str, Any],
    same: Sequence[Candidate],
    skip: frozenset[tuple[str, int]],
    routed: bool,
) -> tuple[list[Cut], Tensor]:
    """Cuts that matter for this input, and the logits with the units zeroed, experts removed.
    Raises ValueError where none matters.
    """
    dense = run(small, inputs)
    for seed in range(0, 400, 100):
        cuts = [random_cut(c, 0.3, seed + i) for i, c in enumerate(same)]
        if routed:
            logits = masked_logits(small, inputs, cuts, skip)
        else:
            zeroed = duplicate(small)
            zero_slices(zeroed, [c.units for c in cuts])
            logits = run(zeroed, inputs)
        if float((logits - dense).abs().max()) > MOVES * max(1.0, float(logits.abs().max())):
            return cuts, logits
    raise ValueError(UNMOVED)
