"""Groups of a Llama-shaped model written out by hand: what discovery must find, and a stand-in
where a test needs none of it.
"""

from __future__ import annotations

import torch

from prunekit.architecture.sizes import Sizes
from prunekit.types import Group, Member


def member(param: str, axis: int, units: int, width: int) -> Member:
    return Member(param, axis, torch.arange(units * width).view(units, width))


def llama_groups(model, kinds=("neurons", "heads", "hidden")) -> list[Group]:
    c = model.config
    groups = []
    for i in range(c.num_hidden_layers):
        at = f"model.layers.{i}.self_attn."
        ff = f"model.layers.{i}.mlp."
        G, D = c.num_key_value_heads, c.head_dim
        rep = c.num_attention_heads // G
        heads = [member(at + "q_proj.weight", 0, G, rep * D)]
        heads += [member(at + f"{n}_proj.weight", 0, G, D) for n in "kv"]
        heads += [member(at + "o_proj.weight", 1, G, rep * D)]
        F = c.intermediate_size
        neurons = [
            member(ff + f"{n}_proj.weight", int(n == "down"), F, 1) for n in ("gate", "up", "down")
        ]
        groups += [
            Group(f"heads.{i}", "heads", i, G, tuple(heads)),
            Group(f"neurons.{i}", "neurons", i, F, tuple(neurons)),
        ]
    C = c.hidden_size
    hidden = []
    for n, p in model.named_parameters():
        if p.dim() == 1:
            hidden.append(member(n, 0, C, 1))
        else:
            hidden.append(
                member(n, 0 if n.endswith(("o_proj.weight", "down_proj.weight")) else 1, C, 1)
            )
    groups.append(Group("hidden", "hidden", None, C, tuple(hidden)))
    return [g for g in groups if g.kind in kinds]


def pooled_by_hand(model, groups, scores, counts, budget) -> dict[str, torch.Tensor]:
    """What stays when the lowest units of all groups go for as long as no more goes than `counts`
    come to, in units or in parameters; the best of each group stays.
    """
    sizes = Sizes(model, groups)

    def total(gone):
        return sum(gone.values()) if budget == "units" else sizes.removed(gone)

    ranked = sorted(
        (float(s), g.name, u)
        for g in groups
        for u, s in enumerate(scores[g.name])
        if u != int(scores[g.name].argmax())
    )
    kept = {g.name: torch.ones(g.units, dtype=torch.bool) for g in groups}
    for _, name, unit in ranked:
        gone = {n: int((~mask).sum()) + (n == name) for n, mask in kept.items()}
        if total(gone) > total(counts):
            break
        kept[name][unit] = False
    return kept


def tiny_llama(**over):
    """2 layers, hidden 24, 6 heads over 3 kv heads of 4 channels, ffn 20: all sizes apart."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(
        vocab_size=101,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
    )
    model = LlamaForCausalLM(
        LlamaConfig(**sizes | dict(head_dim=4, max_position_embeddings=64) | over)
    ).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (p.shape[-1] ** -0.5) + (1.0 if p.dim() == 1 else 0.0))
    return model


def inputs_of(model, tokens, names):
    """name -> (N * T, in) inputs of the linear modules."""
    seen = {}
    hooks = [
        model.get_submodule(n).register_forward_pre_hook(
            lambda _m, a, n=n: seen.update({n: a[0].flatten(0, 1)})
        )
        for n in names
    ]
    with torch.no_grad():
        model(tokens)
    for h in hooks:
        h.remove()
    return seen


def reader_of(group: Group) -> str:
    """The linear module that reads the heads or neurons of a block."""
    kind = "self_attn.o_proj" if group.kind == "heads" else "mlp.down_proj"
    return f"model.layers.{group.layer}.{kind}"
