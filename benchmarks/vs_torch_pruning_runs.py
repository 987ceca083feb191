"""Runs of Torch-Pruning for vs_torch_pruning.py: what it is told, what it cuts, and whether that is
right.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from prunekit.errors import in_short

RATIO, ROUND = 1 / 3, 4
"""Share removed (2 of 6 heads and 16 of 48 channels: the widths of heads and channels stay equal),
and the example's `round_to`.
"""
Lost = list[tuple[str, int, Any]]
"""(tensor, axis, indices that went)."""
Plan = Callable[[Any], Iterator[Any]]
"""Model -> Torch-Pruning's groups, each to be cut before the next is asked for."""


def tensors(model: Any) -> dict[str, Any]:
    return dict(model.named_parameters(remove_duplicate=False))


def prune(model: Any, plan: Plan) -> tuple[Lost, float]:
    """Cut in place what the plan yields; what went is read off numbers that stand in for the
    weights meanwhile. Seconds for the cutting.
    """
    import torch

    start = time.perf_counter()
    groups = plan(model)
    real = {n: p.detach().clone() for n, p in tensors(model).items()}
    for p in {id(p): p for p in tensors(model).values()}.values():
        p.data = torch.arange(p.numel(), dtype=torch.float32).reshape(p.shape)
    for group in groups:
        group.prune()
    seconds = time.perf_counter() - start
    lost: Lost = []
    values = {}
    for name, p in tensors(model).items():
        ids = p.detach().long()
        values[id(p)] = (p, real[name].flatten()[ids])
        for axis, size in enumerate(real[name].shape):
            if p.shape[axis] < size:
                stays = torch.zeros(size, dtype=torch.bool)
                stays[ids // real[name].stride(axis) % size] = True
                lost.append((name, axis, (~stays).nonzero()[:, 0]))
    for p, value in values.values():
        p.data = value
    return lost, seconds


def by_pruner(inputs: Any, settings: Callable[[Any], dict[str, Any]]) -> Plan:
    """What Torch-Pruning's pruner chooses."""

    def plan(model: Any) -> Iterator[Any]:
        import torch_pruning as tp

        score = tp.importance.GroupMagnitudeImportance(p=2)
        pruner = tp.pruner.BasePruner(
            model, inputs, score, global_pruning=False, round_to=ROUND, **settings(model)
        )
        return pruner.step(interactive=True)

    return plan


def by_graph(inputs: Any, known: Any, kind: str) -> Plan:
    """Random units of each group, asked of Torch-Pruning's graph at a layer that makes them, and at
    others that it did not reach.
    """

    def plan(model: Any) -> Iterator[Any]:
        import torch
        import torch_pruning as tp

        from prunekit.graph.verification import random_cut

        graph = tp.DependencyGraph().build_dependency(model, example_inputs=inputs)

        def groups() -> Iterator[Any]:
            for i, c in enumerate(c for c in known.candidates if c.group.kind == kind):
                gone = ~random_cut(c, RATIO, i).units.mask
                layers = [(x, m, x.out_features) for x, m in makers(model, c.group)]
                for layer, member, size in layers[:1] if kind == "hidden" else layers:
                    if layer.out_features == size and isinstance(layer, torch.nn.Linear):
                        index = member.index[gone].flatten().sort().values.tolist()
                        yield graph.get_pruning_group(layer, tp.prune_linear_out_channels, index)

        return groups()

    return plan


def reference(model: Any, inputs: Any, lost: Lost, skip: Any) -> Any:
    """Logits with what went set to zero and statistics over what stays."""
    import torch

    from prunekit.graph.masked_reference import Masked
    from prunekit.graph.model_settings import use_plain_code
    from prunekit.graph.sample_run import logits_of
    from prunekit.graph.trace import trace
    from prunekit.graph.verification import duplicate

    zeroed = duplicate(model)
    use_plain_code(zeroed)
    names = tensors(zeroed)
    with torch.no_grad():
        for name, axis, index in lost:
            names[name].index_fill_(axis, index, 0)
    own = dict(zeroed.named_parameters())
    known = [(n, a, i) for n, a, i in lost if n in own]
    return logits_of(trace(zeroed, inputs, Masked(zeroed, skip, known))[1]).float()


def judge(
    model: Any,
    pruned: Any,
    inputs: Any,
    lost: Lost,
    known: Any,
    kinds: Sequence[str],
    fixes: Iterator[Callable[[Any], None]],
) -> str:
    """Nothing if the pruned model is right after one of the fixes, else what is wrong with it."""
    import torch

    from prunekit.graph.sample_run import ERRORS, logits_of

    hit = {(n, a) for n, a, _ in lost}
    for kind in kinds:
        groups = [c.group for c in known.candidates if c.group.kind == kind]
        missed = [g.name for g in groups if not any((m.param, m.axis) in hit for m in g.members)]
        if missed or not groups:
            return f"nothing removed from {len(missed)} of {len(groups)} groups of {kind}"
    with torch.no_grad():
        dense = logits_of(model(**inputs)).float()
    expected = reference(model, inputs, lost, known.skip)
    scale = max(1.0, float(expected.abs().max()))
    if float((expected - dense).abs().max()) < 1e-3 * scale:
        return "the logits do not move"
    why = ""
    for fix in fixes:
        tried = copy.deepcopy(pruned)
        try:
            fix(tried)
            with torch.no_grad():
                off = float((logits_of(tried(**inputs)).float() - expected).abs().max()) / scale
        except ERRORS as e:
            why = why or in_short(e, 80)
            continue
        if off < 1e-4:
            return ""
        why = f"removal differs from zeroing by {off:.1e}"
    return why


# ---- the documented recipe


def example_settings(model: Any) -> dict[str, Any]:
    """What the example gives the pruner: heads of `self_attn`, halves of `gate_up_proj`; the head
    of the model is left out.
    """
    heads, halves = {}, {}
    for name, m in model.named_modules():
        if name.endswith("self_attn") and hasattr(m, "q_proj"):
            heads[m.q_proj] = model.config.num_attention_heads
            heads[m.k_proj] = heads[m.v_proj] = (
                getattr(model.config, "num_key_value_heads", None) or heads[m.q_proj]
            )
        elif name.endswith("self_attn") and hasattr(m, "qkv_proj"):
            heads[m.qkv_proj] = model.config.num_attention_heads
        if name.endswith("mlp") and hasattr(m, "gate_up_proj"):
            halves[m.gate_up_proj] = 2
    return {
        "pruning_ratio": RATIO,
        "ignored_layers": [model.get_output_embeddings()],
        "num_heads": heads,
        "prune_num_heads": True,
        "prune_head_dims": False,
        "head_pruning_ratio": RATIO,
        "out_channel_groups": halves,
    }


def example_sizes(before: Any) -> Callable[[Any], None]:
    """The sizes that the example sets after pruning."""
    heads = getattr(before.config, "num_attention_heads", None)
    grouped = getattr(before.config, "num_key_value_heads", heads) != heads

    def fix(model: Any) -> None:
        config = model.config
        config.hidden_size = model.get_output_embeddings().in_features
        for name, m in model.named_modules():
            if name.endswith("self_attn"):
                m.hidden_size = (
                    m.q_proj.out_features if hasattr(m, "q_proj") else m.qkv_proj.out_features // 3
                )
                m.num_heads = config.num_attention_heads = m.hidden_size // m.head_dim
                if not grouped:
                    m.num_key_value_heads = m.num_heads
                m.num_key_value_groups = m.num_heads // getattr(
                    config, "num_key_value_heads", m.num_heads
                )
            elif name.endswith("mlp"):
                halves = hasattr(m, "gate_up_proj")
                layer = m.gate_up_proj if halves else m.gate_proj
                m.hidden_size = layer.in_features
                config.intermediate_size = layer.out_features // (2 if halves else 1)
        if not grouped:
            config.num_key_value_heads = config.num_attention_heads

    return fix


# ---- the same with help


def makers(model: Any, group: Any) -> list[tuple[Any, Any]]:
    """The linear layers whose outputs are the group's units, with the members that say which."""
    import torch

    found = []
    for m in group.members:
        path, _, leaf = m.param.rpartition(".")
        layer = model.get_submodule(path)
        if (
            leaf == "weight"
            and m.axis == 0
            and isinstance(layer, torch.nn.Linear)
            and layer is not model.get_output_embeddings()
        ):
            found.append((layer, m))
    return found


def helped_settings(model: Any, known: Any, kind: str) -> dict[str, Any]:
    from prunekit.graph.module_sizes import standard

    heads, halves, ratios = {}, {}, {}
    for group in (c.group for c in known.candidates if c.group.kind == kind):
        layers = [x for x, _ in makers(model, group)]
        ratios |= dict.fromkeys(layers, RATIO)
        if kind == "heads":
            most = standard(model.config, "num_attention_heads") or group.units
            wide = max((x.out_features for x in layers), default=0)
            heads |= {x: most if x.out_features == wide else group.units for x in layers}
        elif kind == "neurons" and len(layers) == 1:
            halves |= {x: 2 for x in layers if x.out_features == 2 * group.units}
    head = model.get_output_embeddings()
    return {
        "pruning_ratio": 0.0,
        "pruning_ratio_dict": ratios,
        "ignored_layers": [head] if head is not None else [],
        "num_heads": heads,
        "prune_num_heads": True,
        "prune_head_dims": False,
        "head_pruning_ratio": RATIO,
        "out_channel_groups": halves,
    }


def helped_sizes(before: Any, known: Any, kind: str, lost: Lost) -> Iterator[Callable[[Any], None]]:
    """None, the example's, then those that our discovery saw shrink: certain ones, with configs,
    all.
    """
    import torch

    from prunekit.graph.groups import Cut
    from prunekit.graph.module_sizes import Recipe, required_sizes, set_sizes
    from prunekit.graph.recipes import sizes_in

    yield lambda model: None
    yield example_sizes(before)
    gone = {(n, a): len(i) for n, a, i in lost}
    cuts = []
    for c in (c for c in known.candidates if c.group.kind == kind):
        units = [
            gone[m.param, m.axis] // m.index.shape[1]
            for m in c.group.members
            if (m.param, m.axis) in gone
        ]
        cuts.append(Cut.everywhere(c, torch.arange(c.group.units) >= max(units, default=0)))
    sizes = sizes_in(before, cuts)
    plain = [k for k, doubtful in sizes.items() if not doubtful]
    for settings in ([k for k in plain if not k.in_config], plain, list(sizes)):
        recipe = Recipe(frozenset(settings))
        changes = required_sizes(before, cuts, {c.candidate.pattern: recipe for c in cuts})
        yield lambda model, changes=changes: set_sizes(model, changes, own=True)  # type: ignore[misc]
