"""LLM Surgeon on coupled units: exact counts, shots, refits, prices, and what must not change."""

from __future__ import annotations

import copy

import pytest
import torch
from problems import check, problem, uniform
from tiny_models import logits, tiny_model

from prunekit.architecture.linear import readers
from prunekit.architecture.sizes import Sizes
from prunekit.errors import ConfigError
from prunekit.registry import pruners
from prunekit.scoring.kronecker import kronecker_factors
from prunekit.solvers.llm_surgeon import column_costs, damped_inverse, without_columns


def prune(model, tokens, share=0.3, of="prunable", exclude=None, ranking="local", **options):
    pruner = pruners.build({"name": "llm_surgeon", "shots": 1, **options})
    ratio = uniform(share, of, ranking=ranking)
    return pruner(problem(model, tokens, ratio=ratio, exclude=exclude))


def drift(model, tokens, dense) -> float:
    return float((logits(model, tokens) - dense).norm() / dense.norm())


@pytest.fixture
def llama():
    return tiny_model("llama", layers=3)


def test_ratio_zero_changes_nothing(llama, tokens):
    before = copy.deepcopy(llama.state_dict())
    out = prune(llama, tokens, share=0.0, shots=4)
    assert out.kept == {}
    assert set(llama.state_dict()) == set(before)
    assert all(torch.equal(v, before[k]) for k, v in llama.state_dict().items())


@pytest.mark.parametrize("shots", [1, 3])
def test_counts_are_exact(llama, text, shots):
    out = prune(llama, text, share=0.5, of="units", shots=shots, bias=False)
    assert out.notes["counts"] == {
        f"{kind}.{i}": n for i in range(3) for kind, n in (("heads", 1), ("neurons", 48))
    }
    assert len(out.notes["expected"]) == shots
    for layer in llama.model.layers:
        assert layer.mlp.down_proj.weight.shape == (64, 48)
        assert layer.mlp.down_proj.bias is None
        assert layer.self_attn.k_proj.out_features == 20


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_one_shot_follows_the_formula(arch, text, bias):
    """Costs, choice and refit from the factors, written plainly; a bias is an input of 1."""
    model = tiny_model(arch)
    dense = copy.deepcopy(model)
    out = prune(model, text, share=0.25, of="units", kinds=["neurons"], bias=bias, remove=False)
    for group in out.groups:
        [r] = readers(dense, group)
        found = kronecker_factors(dense, [r.name], problem(dense, text).run())[r.name]
        W, affine = r.weight.double(), bias or r.module.bias is not None
        if affine:
            b = torch.zeros(len(W)) if r.module.bias is None else r.module.bias
            W = torch.cat([W, b[:, None].double()], 1)
        inverse = damped_inverse(found.inputs(affine), 0.01)
        costs = column_costs(W, inverse, found.outputs(), r.member.index)
        torch.testing.assert_close(out.scores[group.name], costs.float(), rtol=1e-4, atol=1e-9)
        gone = costs.argsort()[:24].sort()[0]
        assert torch.equal(gone, (~out.kept[group.name]).nonzero()[:, 0])
        after = without_columns(W, inverse, gone).float()
        [now] = readers(model, group)
        torch.testing.assert_close(now.weight, after[:, : now.weight.shape[1]])
        if affine:
            torch.testing.assert_close(now.module.bias, after[:, -1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("shots", [1, 3])
@pytest.mark.parametrize("arch", ["llama", "opt", "phi3", "falcon"])
def test_zeroing_equals_removing(arch, text, shots):
    zeroed, smaller = tiny_model(arch), tiny_model(arch)
    prune(zeroed, text, shots=shots, ranking="global", remove=False)
    out = prune(smaller, text, shots=shots, ranking="global")
    assert out.kept
    assert sum(p.numel() for p in smaller.parameters()) < sum(
        p.numel() for p in zeroed.parameters()
    )
    torch.testing.assert_close(logits(zeroed, text), logits(smaller, text), rtol=1e-3, atol=1e-4)


def duplicate(model):
    """Every second neuron a copy of the one before it."""
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                linear.weight[1::2] = linear.weight[::2]


def test_shots_see_what_earlier_ones_left(llama, text):
    """Each of two equal neurons costs nothing while the other is there. One shot takes both; two
    hold the second one dear once the first is gone.
    """
    duplicate(llama)
    dense, drifts = logits(llama, text), []
    for shots in (1, 24):
        model = copy.deepcopy(llama)
        prune(
            model,
            text,
            share=0.5,
            of="units",
            kinds=["neurons"],
            shots=shots,
            ridge=1e-6,
            bias=False,
        )
        drifts.append(drift(model, text, dense))
    assert drifts[1] < 0.05 < drifts[0]


def test_refits_make_up_for_what_goes(llama, text):
    dense, plain = logits(llama, text), copy.deepcopy(llama)
    out = prune(llama, text, kinds=["neurons"], remove=False)
    for group in out.groups:
        [r] = readers(plain, group)
        with torch.no_grad():
            r.weight[:, ~out.kept[group.name]] = 0
    assert drift(llama, text, dense) < 0.9 * drift(plain, text, dense)


def test_units_compete_by_what_a_parameter_costs(llama, text):
    """A head has 170 neurons' worth of parameters on a real model; by its own cost it would never
    go.
    """
    for per in ("parameter", "unit"):
        model = copy.deepcopy(llama)
        out = prune(model, text, share=0.4, ranking="global", per=per, remove=False)
        sizes = Sizes(model, out.groups)
        price = {
            g.name: out.scores[g.name] / (sizes.removed({g.name: 1}) if per == "parameter" else 1)
            for g in out.groups
        }
        gone = torch.cat([price[n][~kept] for n, kept in out.kept.items()])
        # The best unit of every group was not in play.
        left = torch.cat([p[out.kept[n]].sort()[0][:-1] for n, p in price.items()])
        assert gone.max() <= left.sort()[0][1]  # but for one that did not fit


def test_the_cost_of_a_group_adds_the_rows_that_make_its_units(llama, text):
    reader = prune(copy.deepcopy(llama), text, kinds=["neurons"], bias=False).scores
    both = prune(copy.deepcopy(llama), text, kinds=["neurons"], bias=False, cost="group").scores
    names = [f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up")]
    found = kronecker_factors(llama, names, problem(llama, text).run())
    rows = torch.zeros(96, dtype=torch.double)
    for name in names:
        W, A = llama.get_submodule(name).weight.double(), found[name].inputs(False).double()
        rows += (W @ A * W).sum(1) / damped_inverse(found[name].outputs(), 0.01).diagonal() / 2
    torch.testing.assert_close(
        both["neurons.1"] - reader["neurons.1"], rows.float(), rtol=1e-3, atol=1e-8
    )


def test_excluded_blocks_stay_as_they_are(llama, text):
    before = copy.deepcopy(llama.model.layers[1].state_dict())
    prune(llama, text, shots=2, exclude=lambda groups: [g for g in groups if g.layer != 1])
    after = llama.model.layers[1].state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(v, before[k]) for k, v in after.items())


def test_training_between_shots_moves_weights_and_no_zero(llama, text):
    plain, zeroed = copy.deepcopy(llama), copy.deepcopy(llama)
    prune(plain, text, shots=2)
    trained = {"shots": 2, "correction_steps": 2, "correction_lr": 1e-2}
    prune(zeroed, text, remove=False, **trained)
    prune(llama, text, **trained)
    torch.testing.assert_close(logits(llama, text), logits(zeroed, text), rtol=1e-3, atol=1e-4)
    assert not torch.equal(logits(llama, text), logits(plain, text))
    assert not any("lora" in name for name, _ in llama.named_modules())


@pytest.mark.parametrize("options", [{"batch": 3}, {"factors": "device"}])
def test_how_the_text_goes_through_does_not_matter(llama, text, options):
    other = copy.deepcopy(llama)
    first = prune(llama, text, shots=2)
    second = prune(other, text, shots=2, **options)
    assert all(torch.equal(mask, second.kept[name]) for name, mask in first.kept.items())
    torch.testing.assert_close(logits(llama, text), logits(other, text), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("arch", ["gemma2", "gpt_neox", "bloom"])
def test_other_architectures_shrink_and_stay_near_the_dense_model(text, arch):
    model = tiny_model(arch)
    dense = logits(model, text)
    before = sum(p.numel() for p in model.parameters())
    prune(model, text, share=0.2, ranking="global", shots=2, cost="group")
    assert sum(p.numel() for p in model.parameters()) < before
    assert drift(model, text, dense) < 1


def test_what_cannot_be_is_said_before_anything_is_loaded():
    mixtral = problem(tiny_model("mixtral", meta=True), ratio=uniform(0.2))
    with pytest.raises(ConfigError, match="none reads neurons.0"):
        check("llm_surgeon", mixtral)
    llama = problem(tiny_model("llama", meta=True), ratio=uniform(0.01))
    with pytest.raises(ConfigError, match="2 units go in all"):
        check("llm_surgeon", llama, shots=3, kinds=["neurons"])
    expected = check("llm_surgeon", llama, shots=2, kinds=["neurons"])
    assert expected.counts == {"neurons.0": 1, "neurons.1": 1}
