"""Taylor scores against the paper's formulas written out with all gradients in memory."""

from __future__ import annotations

import pytest
import torch
from reference import llama_groups, tiny_llama

from prunekit.activations.runs import ModelRun
from prunekit.criteria.taylor import taylor

MODES = ("vectorize", "param_first", "param_second", "param_mix")


def gradients(model, tokens):
    """Batch gradient and mean squared per-sample gradient of every parameter, as LLM-Pruner
    accumulates them.
    """

    def backward(x):
        model.zero_grad()
        model(input_ids=x, labels=x).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    g = backward(tokens)
    squares = [backward(x[None]) for x in tokens]
    model.zero_grad()
    return g, {n: torch.stack([s[n] ** 2 for s in squares]).mean(0) for n in g}


def plain(model, groups, tokens, mode, reduce):
    """Scores written from the fact sheet, section 4, without any of the product's folding."""
    g, f = gradients(model, tokens)
    params = dict(model.named_parameters())
    scores = {}
    for group in groups:
        rows = []
        for m in group.members:
            w = params[m.param].detach()
            first, second = w * g[m.param], w * f[m.param] * w
            s = {
                "vectorize": first,
                "param_first": first.abs(),
                "param_second": second,
                "param_mix": (first - 0.5 * second).abs(),
            }[mode]
            channels = s.sum(1 - m.axis).abs() if w.dim() == 2 else s.abs()
            per_unit = torch.stack([channels[i] for i in m.index])  # (U, width)
            D = group.width
            rows.append(
                sum(per_unit[:, r * D : (r + 1) * D] for r in range(per_unit.shape[1] // D))
            )
        x = torch.stack(rows)
        x = {
            "sum": x.sum(0),
            "mean": x.mean(0),
            "max": x.amax(0),
            "prod": x.prod(0),
            "first": x[0],
            "last": x[-1],
        }[reduce]
        scores[group.name] = x.sum(1)
    return scores


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_scores_match_the_formula(mode, tied, tokens):
    model = tiny_llama(tie_word_embeddings=tied)
    groups = llama_groups(model)
    want = plain(model, groups, tokens, mode, "sum")
    got = taylor(model, groups, ModelRun(model, tokens), mode=mode)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("reduce", ["sum", "mean", "max", "prod", "first", "last"])
def test_reductions_match(reduce, tokens):
    model = tiny_llama()
    groups = llama_groups(model, ("neurons", "heads"))
    want = plain(model, groups, tokens, "param_first", reduce)
    got = taylor(model, groups, ModelRun(model, tokens), reduce=reduce)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-9)


def test_query_heads_count_for_their_own_kv_head():
    """Only the query heads of kv head 1 have weight: its unit alone may score through q_proj (the
    original spreads it over all).
    """
    model = tiny_llama()
    [group] = [g for g in llama_groups(model, ("heads",)) if g.layer == 0]
    D, rep = 4, 2
    with torch.no_grad():
        q = model.model.layers[0].self_attn.q_proj.weight
        q.zero_()
        q[rep * D : 2 * rep * D] = 1
    got = taylor(model, [group], ModelRun(model, torch.randint(8, 100, (2, 12))), reduce="first")
    assert got[group.name].gt(0).tolist() == [False, True, False]


@pytest.mark.parametrize("mode", ["param_first", "param_second", "param_mix"])
def test_split_batches_give_the_same_scores(tokens, mode):
    model = tiny_llama()
    groups = llama_groups(model)
    sizes = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    whole = taylor(model, groups, ModelRun(model, tokens), mode=mode)
    assert sizes.pop(0) == len(tokens) == 4
    alone, sizes[:] = sizes[:], []  # of weights that are no linear layer's, sample by sample
    split = taylor(model, groups, ModelRun(model, tokens), mode=mode, batch=3)
    assert sizes == [3, 1, *alone]
    for name in whole:
        torch.testing.assert_close(split[name], whole[name], rtol=1e-4, atol=1e-7)


def test_model_is_left_as_it_was(tokens):
    model = tiny_llama()
    model.model.norm.weight.requires_grad_(False)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        logits = model(tokens).logits
    taylor(model, llama_groups(model), ModelRun(model, tokens), mode="param_mix")
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, logits)
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n])
        assert p.grad is None
    assert not model.model.norm.weight.requires_grad
    assert "forward" not in vars(model.model.layers[0])
    assert not model.model.layers[0].mlp.gate_proj._forward_hooks
