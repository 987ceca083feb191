"""LLM Surgeon on matrices by themselves: the paper's formulas written plainly, counts, shots."""

from __future__ import annotations

import copy

import pytest
import torch
from problems import check, problem, uniform
from tiny_models import logits, tiny_model

from prunekit.architecture.matrices import matrices, matrix, module_name
from prunekit.errors import ConfigError
from prunekit.pruners.llm_surgeon_matrices import Shot, State, curvature
from prunekit.registry import pruners
from prunekit.scoring.kronecker import kronecker_factors
from prunekit.selection.lines import no_lines

STRUCTURES = ["rows_and_columns", "rows", "columns", "elements"]


def prune(model, tokens, share=0.3, ranking="local", **options):
    pruner = pruners.build({"name": "llm_surgeon_matrices", "shots": 1, "together": 400, **options})
    return pruner(problem(model, tokens, ratio=uniform(share, "prunable", ranking=ranking)))


@pytest.fixture
def llama():
    return tiny_model("llama")


@pytest.mark.parametrize("structure", STRUCTURES)
def test_ratio_zero_changes_nothing(llama, tokens, structure):
    before = copy.deepcopy(llama.state_dict())
    out = prune(llama, tokens, share=0.0, structure=structure, shots=3)
    assert out.kept == {}
    assert all(torch.equal(v, before[k]) for k, v in llama.state_dict().items())


def kept_weights(W, A_inverse, G_inverse, gone):
    """The least change of `W` under `G (x) A` that makes the elements `gone` zero: the equations of
    Lagrange over the whole matrix at once.
    """
    precise = torch.kron(G_inverse, A_inverse)  # rows of W one behind the other
    places = gone.flatten().nonzero()[:, 0]
    K = precise[places][:, places]
    step = precise[:, places] @ torch.linalg.solve(K, W.flatten()[places])
    return (W.flatten() - step).view_as(W)


@pytest.mark.parametrize(("arch", "target"), [("llama", "down_proj"), ("gpt2", "mlp.c_proj")])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_one_shot_follows_the_formula(arch, target, structure, text):
    """The lines or elements that cost least by themselves, and the least change of the matrix that
    makes all of them zero together.
    """
    model = tiny_model(arch, hidden=16, ffn=24, heads=2)
    dense = copy.deepcopy(model)
    out = prune(model, text, structure=structure, targets=[target])
    for g in out.groups:
        W = matrix(dense, g).detach().double()
        found = kronecker_factors(dense, [module_name(g)], problem(dense, text).run())
        A, G = (
            found[module_name(g)].inputs(False).double(),
            found[module_name(g)].outputs().double(),
        )
        A_inverse, G_inverse = (
            torch.linalg.inv(F + 0.01 * F.diagonal().mean() * torch.eye(len(F))) for F in (A, G)
        )
        kept = ~(matrix(model, g) == 0)
        if structure == "elements":
            cost = W**2 / torch.outer(G_inverse.diagonal(), A_inverse.diagonal()) / 2
            lowest = cost.flatten().argsort()[: out.notes["counts"][g.name]]
            assert set(lowest.tolist()) == set((~kept).flatten().nonzero()[:, 0].tolist())
            expected = kept_weights(W, A_inverse, G_inverse, ~kept)
        else:
            rows, columns = ~kept.any(1), ~kept.any(0)
            assert torch.equal(kept, ~rows[:, None] & ~columns)
            by_row = torch.einsum("ri,ij,rj->r", W, A, W) / G_inverse.diagonal() / 2
            by_column = torch.einsum("rc,rs,sc->c", W, G, W) / A_inverse.diagonal() / 2
            for cost, gone in ((by_row, rows), (by_column, columns)):
                assert set(cost.argsort()[: int(gone.sum())].tolist()) == set(
                    gone.nonzero()[:, 0].tolist()
                )
            if structure == "rows_and_columns" and rows.any() and columns.any():
                assert by_row[rows].max() <= by_column[~columns].min()
                assert by_column[columns].max() <= by_row[~rows].min()
            changes = [
                kept_weights(W, A_inverse, G_inverse, gone.expand_as(W)) - W
                for gone in (rows[:, None], columns[None])
            ]
            expected = W + sum(changes)
            count = int((~kept).sum())
            assert count <= 0.3 * W.numel() < count + max(W.shape)
        torch.testing.assert_close(matrix(model, g).double(), expected * kept, rtol=1e-3, atol=1e-5)


def test_with_equal_factors_elements_go_by_their_size(llama, text, monkeypatch):
    """G = A = I is magnitude pruning, and moves nothing."""
    from prunekit.scoring.kronecker import Factors

    monkeypatch.setattr(Factors, "inputs", lambda self, affine: torch.eye(len(self.gram) - 1))
    monkeypatch.setattr(Factors, "outputs", lambda self: torch.eye(len(self.gradient)))
    dense = copy.deepcopy(llama)
    out = prune(llama, text, share=0.5, structure="elements", ranking="global", shots=2)
    size = torch.cat([matrix(dense, g).detach().abs().flatten() for g in out.groups])
    stays = torch.cat([out.kept[g.name].flatten() for g in out.groups])
    assert size[~stays].max() <= size[stays].min()
    for g in out.groups:
        assert torch.equal(matrix(llama, g), matrix(dense, g) * out.kept[g.name])


@pytest.mark.parametrize("ranking", ["local", "global"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_counts_are_met_and_zeros_stay_over_shots(llama, text, structure, ranking):
    out = prune(llama, text, share=0.5, structure=structure, shots=3, ranking=ranking)
    total = sum(g.units for g in out.groups)
    gone = sum(out.notes["counts"].values())
    slack = len(out.groups) * 96 if ranking == "local" else 96  # a line more would be too many
    assert 0 <= 0.5 * total - gone < (1 if structure == "elements" else slack)
    assert len(out.notes["expected"]) == 3
    for g in out.groups:
        assert not matrix(llama, g)[~out.kept[g.name]].any()
        if structure != "elements":
            rows, columns = out.notes["rows_and_columns"][g.name]
            R, C = matrix(llama, g).shape
            assert out.notes["counts"][g.name] == R * C - (R - rows) * (C - columns)


@torch.no_grad()
def test_lines_that_are_gone_make_up_for_nothing(llama, text):
    [g, *_] = matrices(llama, ["down_proj"])
    W = matrix(llama, g)
    found = kronecker_factors(llama, [module_name(g)], problem(llama, text).run())
    gone = no_lines(*W.shape)
    gone.rows[:3], gone.columns[5:9] = True, True
    state, how = State({g.name: gone}, {}), Shot("rows_and_columns", None, 0.01, 400)
    c = curvature(g, W, found, state, how)
    of = found[module_name(g)]
    for full, inverse, lost in (
        (of.inputs(False), c.A_inverse, gone.columns),
        (of.outputs(), c.G_inverse, gone.rows),
    ):
        left = full[~lost][:, ~lost].double()
        ridge = 0.01 * left.diagonal().mean() * torch.eye(len(left))
        torch.testing.assert_close(inverse[~lost][:, ~lost], (left + ridge).inverse())
        assert not inverse[lost][:, ~lost].any()


def test_more_shots_lose_less(llama, text):
    """Of two equal inputs either is for nothing while the other is there."""
    with torch.no_grad():
        for layer in llama.model.layers:
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                linear.weight[1::2] = linear.weight[::2]
    dense, drifts = logits(llama, text), []
    for shots in (1, 24):
        model = copy.deepcopy(llama)
        prune(model, text, 0.5, structure="columns", shots=shots, ridge=1e-6, targets=["down_proj"])
        drifts.append(float((logits(model, text) - dense).norm() / dense.norm()))
    assert drifts[1] < 0.3 * drifts[0]


def test_two_of_four(llama, text):
    out = prune(llama, text, 0.5, structure="elements", pattern="2:4")
    for g in out.groups:
        assert (out.kept[g.name].view(-1, 4).sum(1) == 2).all()


def test_training_between_shots_moves_weights_and_no_zero(llama, text):
    plain = copy.deepcopy(llama)
    without = prune(plain, text, shots=2, structure="elements")
    out = prune(llama, text, shots=2, structure="elements", correction_steps=2, correction_lr=1e-2)
    assert out.notes["counts"] == without.notes["counts"]
    for g in out.groups:
        assert not matrix(llama, g)[~out.kept[g.name]].any()
    assert not torch.equal(logits(llama, text), logits(plain, text))
    assert not any("lora" in name for name, _ in llama.named_modules())


@pytest.mark.parametrize("arch", ["opt", "bloom", "mixtral"])
def test_other_architectures_lose_elements_and_stay_finite(text, arch):
    model = tiny_model(arch)
    out = prune(model, text, share=0.2, ranking="global", shots=2)
    assert sum(out.notes["counts"].values()) > 0
    assert logits(model, text).isfinite().all()


def test_what_cannot_be_is_said_before_anything_is_loaded():
    half = problem(tiny_model("llama", meta=True), ratio=uniform(0.5, "prunable"))
    with pytest.raises(ConfigError, match=r"pruner\.structure=elements"):
        check("llm_surgeon_matrices", half, pattern="2:4")
    with pytest.raises(ConfigError, match=r"comes in one shot"):
        check("llm_surgeon_matrices", half, pattern="2:4", structure="elements")
    by_kind = problem(
        tiny_model("llama", meta=True), ratio=uniform(0.5, "prunable", ranking="kind")
    )
    with pytest.raises(ConfigError, match="local or global"):
        check("llm_surgeon_matrices", by_kind)
