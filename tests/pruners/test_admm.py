"""ADMM and ALPS on tiny models: the two pruners that see a matrix and its gram matrix at a time."""

from __future__ import annotations

import copy

import pytest
import torch
from problems import check, problem, uniform
from tiny_models import tiny_model

from prunekit.activations.gram import grams
from prunekit.architecture.matrices import matrix
from prunekit.errors import ConfigError
from prunekit.registry import pruners, ratios
from prunekit.selection.elements import per_matrix
from prunekit.solvers.admm import admm
from prunekit.solvers.alps import alps

NAMES = ("admm", "alps")
ARCHS = ["llama", "gpt2", "opt", "phi3", "qwen2_moe"]
TEXT = torch.randint(8, 100, (16, 32), generator=torch.Generator().manual_seed(0))


def pose(model, target=0.5, text=TEXT, **ratio):
    return problem(model, text, ratio=uniform(target, **ratio))


def prune(name, model, target=0.5, text=TEXT, **options):
    asked = pose(model, target, text)
    check(name, asked, **options)
    return pruners.build({"name": name, **options})(asked)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("arch", ARCHS)
def test_half_of_every_matrix_goes_and_the_others_move(name, arch):
    model = tiny_model(arch)
    before = copy.deepcopy(model)
    out = prune(name, model)
    for g in out.groups:
        W = matrix(model, g)
        assert int((W == 0).sum()) == g.units // 2 == out.notes["counts"][g.name]
        assert torch.equal(model.get_parameter(g.matrix) != 0, out.kept[g.name])
        assert not torch.equal(W, matrix(before, g) * (W != 0))
    with torch.no_grad():
        assert torch.isfinite(model(TEXT).logits).all()


@pytest.mark.parametrize(("name", "solver"), [("admm", admm), ("alps", alps)])
def test_the_first_block_is_the_solvers_on_its_dense_inputs(name, solver):
    model = tiny_model("llama")
    before = copy.deepcopy(model)
    out = prune(name, model)
    asked = pose(before)
    first = [g for g in out.groups if g.layer == 0]
    for alike, gram in grams(before, first, asked.run()):
        for g in alike:
            W = matrix(before, g).detach()
            new, mask = solver(W, gram, per_matrix, g.units // 2)
            torch.testing.assert_close(matrix(model, g), new * mask, rtol=1e-4, atol=1e-5)
            gap = W - new
            assert out.notes["costs"][g.name] == pytest.approx(
                float(((gap @ gram) * gap).sum()), rel=1e-3
            )


@pytest.mark.parametrize("name", NAMES)
def test_nearer_to_the_dense_model_than_sparsegpt(name):
    model = tiny_model("llama")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        dense = model(TEXT).logits
        prune(name, model)
        prune("sparsegpt", twin, block=32)
        assert (model(TEXT).logits - dense).norm() < (twin(TEXT).logits - dense).norm()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("pattern", ["2:4", "N:4"])
def test_a_pattern_holds_along_the_inputs(name, arch, pattern):
    model = tiny_model(arch)
    for g in prune(name, model, pattern=pattern).groups:
        W = matrix(model, g)
        assert ((W != 0).view(len(W), -1, 4).sum(-1) == 2).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("target", "stay"), [(0.3, 6), (0.4, 5), (0.6, 3)])
def test_a_pattern_holds_where_the_ratio_lies_between_two(name, target, stay):
    """OWL's mixed N:8: what a run keeps is rounded, and the solver takes that many."""
    model = tiny_model("llama")
    out = prune(name, model, target=target, pattern="N:8")
    for g in out.groups:
        runs = (matrix(model, g) != 0).view(len(matrix(model, g)), -1, 8).sum(-1)
        assert (runs == stay).all()
        assert out.notes["counts"][g.name] == g.units * (8 - stay) // 8


@pytest.mark.parametrize("name", NAMES)
def test_every_row_loses_as_many(name):
    model = tiny_model("llama")
    for g in prune(name, model, scope="row").groups:
        W = matrix(model, g)
        assert ((W == 0).sum(1) == W.shape[1] // 2).all()


@pytest.mark.parametrize("name", NAMES)
def test_ratio_zero_changes_nothing(name):
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    out = prune(name, model, target=0.0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert out.kept == {}


@pytest.mark.parametrize("name", NAMES)
def test_shares_may_differ_from_block_to_block(name):
    model = tiny_model("llama")

    def ratio(asked, groups):
        found = ratios.build(uniform(0.5))(asked, groups)
        return type(found)({n: c if ".0." in n else c // 2 for n, c in found.counts.items()})

    out = pruners.build({"name": name})(problem(model, TEXT, ratio=ratio))
    for g in out.groups:
        share = 2 if g.layer == 0 else 4
        assert int((matrix(model, g) == 0).sum()) == g.units // 2 // (share // 2)


@pytest.mark.parametrize("name", NAMES)
def test_what_cannot_be_is_refused_before_the_work(name):
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="the 7 of pruner.pattern do not divide"):
        prune(name, model, pattern="N:7")
    with pytest.raises(ConfigError, match="2:4 removes 0.5 of each matrix, but the ratio asks"):
        prune(name, model, target=0.3, pattern="2:4")
    with pytest.raises(ConfigError, match=f"pruner={name} sees one matrix at a time"):
        check(name, pose(model, ranking="global"))
    rows = problem(model, criterion={"name": "wanda"}, ratio={"name": "besa"})
    for other in (name, "sparsegpt", "sparsellm", "llm_surgeon_matrices"):
        with pytest.raises(ConfigError, match=r"one of its own: give ratio\.per=matrix"):
            check(other, rows)
    with pytest.raises(ConfigError, match=r"targets=\['wheels'\] match no .*there are: .*q_proj"):
        prune(name, model, targets=["q_proj", "wheels"])


@pytest.mark.parametrize("name", [*NAMES, "sparsegpt", "sparsellm"])
def test_less_text_than_inputs_is_said_by_name_before_the_work(name, caplog):
    prune(name, tiny_model("llama"), text=TEXT[:, :5])
    assert caplog.messages[0].startswith(
        "80 calibration tokens say little about the 96 inputs of model.layers.0.mlp.down_proj, the "
        "widest of 2 such modules"
    )
    caplog.clear()
    prune(name, tiny_model("llama"), text=TEXT[:, :6])
    assert not [m for m in caplog.messages if "say little" in m]


def test_a_mask_that_would_not_be_finished_is_refused():
    with pytest.raises(ConfigError, match="pruner.reselect=15 must not exceed pruner.iterations=5"):
        prune("admm", tiny_model("llama"), iterations=5)


def test_the_mask_of_the_dense_weights_may_stay():
    model = tiny_model("llama")
    out = prune("admm", model, reselect=0)
    other = prune("admm", tiny_model("llama"))
    name = out.groups[0].name
    assert not torch.equal(out.kept[name], other.kept[name])


@pytest.mark.parametrize("name", NAMES)
def test_inputs_that_are_not_finite_are_refused_by_the_matrix(name):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1e25)
    with pytest.raises(ConfigError, match="weights.0.mlp.down_proj: no Cholesky"):
        prune(name, model)
