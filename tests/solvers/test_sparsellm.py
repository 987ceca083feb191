"""SparseLLM's alternating updates against the objective, the authors' numbers and brute force."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from paths import authors_numbers
from torch.nn.functional import gelu, relu, silu

from prunekit.errors import ConfigError
from prunekit.solvers import sparsellm
from prunekit.solvers.sparsegpt import (
    highest_of_runs,
    inverse_factor,
    lowest_of_block,
    solve_columns,
)
from prunekit.solvers.sparsellm import Auxiliaries, Ffn, Terms


@pytest.fixture(scope="module")
def golden():
    return authors_numbers("sparsellm_llama")


def block(gated=True, act=silu, seed=0, tokens=200, biases=True):
    """A block of 8 channels and 16 neurons, and its input; float64."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64) * shape[-1] ** -0.5

    ffn = Ffn(
        act,
        draw(16, 8),
        draw(8, 16),
        draw(16, 8) if gated else None,
        draw(16) if biases else None,
        draw(8) if biases else None,
        draw(16) if gated and biases else None,
    )
    return ffn, draw(tokens, 8) @ draw(8, 8) * 4


def pruned(ffn, gram_x, gram_p, share=0.5, damp=0.01, damp_p=0.01, choice=None):
    """Every matrix pruned by SparseGPT."""

    def one(W, gram, damp):
        if W is None:
            return None
        U, _ = inverse_factor(gram, damp, "w")
        chosen = choice or lowest_of_block(
            share if share > 1 else int(share * W.numel()), W.shape[1], 128
        )
        return solve_columns(W, U.to(W), chosen, 128)[0]

    return replace(
        ffn,
        up=one(ffn.up, gram_x, damp),
        gate=one(ffn.gate, gram_x, damp),
        down=one(ffn.down, gram_p, damp_p),
    )


def first(ffn, x, **options):
    p = ffn.neurons(*ffn.before(x))
    return pruned(ffn, x.T @ x, p.T @ p, **options)


def objective(ffn, aux, p, terms):
    """As the paper states it."""
    s, z = ffn.before(aux.x)
    loss = terms.alpha * (aux.z - z).square().sum()
    if aux.s is not None:
        loss = loss + terms.alpha * (aux.s - s).square().sum()
    loss = loss + terms.gamma * (p - ffn.neurons(aux.s, aux.z)).square().sum()
    y = torch.nn.functional.linear(p, ffn.down, ffn.down_bias)
    return loss + terms.beta * (aux.y - y).square().sum()


# ---- the authors' numbers


@pytest.mark.parametrize(
    ("tag", "choice"), [("50", 577), ("70", 807), ("24", None)], ids=["50", "70", "24"]
)
def test_the_authors_numbers(golden, tag, choice):
    """Their ridge is added in place, step after step, to the gram matrix of the first two."""
    x = golden["X"].reshape(-1, 24)
    dense = Ffn(silu, golden["llama_up"], golden["llama_down"], golden["llama_gate"])
    how = {"share": choice} if choice else {"choice": highest_of_runs(2, 4)}
    last, steps = first(dense, x, **how), [dense]
    aux, errors, pinv = Auxiliaries.of(dense, x), [], torch.linalg.pinv(x)
    for step in range(1, 5):
        if step in (1, 2, 4):
            for name in ("gate", "up", "down"):
                expected = golden[f"llama_{tag}_step{step}_{name}"]
                found = getattr(last, name)
                assert torch.equal(found == 0, expected == 0)
                atol = 1e-5 * float(expected.abs().max())
                torch.testing.assert_close(found, expected, rtol=0, atol=atol)
        errors.append(sparsellm.output_error(last, aux))
        sums = sparsellm.update_auxiliaries(aux, last, Terms(), chunk=64)
        if (step, tag) == (1, "70"):
            for name in ("s", "z"):
                expected = golden[f"llama_70_step1_{name}"].T
                torch.testing.assert_close(getattr(aux, name), expected, rtol=0, atol=1e-4)
        full = replace(
            dense,
            up=(pinv @ aux.z).T,
            gate=(pinv @ aux.s).T,
            down=sparsellm.refit(dense.down, sums.pp, sums.yp, 0.0, "down"),
        )
        damp = 1.01 ** (step + 1) - 1
        last = pruned(full, x.T @ x, sums.pp, damp=damp, **how)
        steps.append(full)
    losses = golden[f"llama_{tag}_step4_train_loss"].tolist()
    assert errors == pytest.approx(losses, rel=1e-4)


def test_the_authors_p(golden):
    x = golden["X"].reshape(-1, 24)
    dense = Ffn(silu, golden["llama_up"], golden["llama_down"], golden["llama_gate"])
    down, aux = golden["llama_70_step1_down"], Auxiliaries.of(dense, x)
    inner = sparsellm.curvature(down, Terms(), "p")
    p = sparsellm.update_p(dense.neurons(aux.s, aux.z), aux.y, down, inner, Terms())
    torch.testing.assert_close(p, golden["llama_70_step1_p"].T, rtol=0, atol=1e-4)


def test_a_refit_without_ridge_is_the_pseudo_inverse():
    ffn, x = block()
    target = torch.randn(len(x), 16, dtype=x.dtype)
    found = sparsellm.refit(ffn.up, x.T @ x, target.T @ x, 0.0, "up")
    torch.testing.assert_close(found, (torch.linalg.pinv(x) @ target).T)


def test_a_refit_with_fewer_tokens_than_inputs_stays_near_the_weights():
    ffn, x = block()
    x = x[:3]
    found = sparsellm.refit(ffn.up, x.T @ x, ffn.up @ x.T @ x, 1e-4, "up")
    torch.testing.assert_close(found, ffn.up)  # the targets are met already
    with pytest.raises(ConfigError, match="weights.3, up: no Cholesky"):
        sparsellm.refit(ffn.up, x.T @ x * torch.nan, ffn.up @ x.T @ x, 1e-4, "weights.3, up")


# ---- the sub-steps


def test_p_is_where_the_objective_has_no_slope():
    ffn, x = block()
    aux = Auxiliaries.of(ffn, x)
    sparse = first(ffn, x)
    terms = Terms(alpha=2.0, beta=3.0, gamma=0.7)
    inner = sparsellm.curvature(sparse.down, terms, "p")
    h = sparse.neurons(aux.s, aux.z)
    p = sparsellm.update_p(h, aux.y - sparse.down_bias, sparse.down, inner, terms)
    p.requires_grad_()
    (slope,) = torch.autograd.grad(objective(sparse, aux, p, terms), p)
    assert slope.abs().max() < 1e-9


def test_z_behind_a_gate_is_where_the_objective_has_no_slope():
    ffn, x = block()
    terms = Terms(alpha=2.0, gamma=0.7)
    s, m = ffn.before(x)
    p = torch.randn_like(m)
    z = sparsellm.update_z_gated(m, p, silu(s), terms).requires_grad_()
    loss = 2.0 * (z - m).square().sum() + 0.7 * (p - silu(s) * z).square().sum()
    (slope,) = torch.autograd.grad(loss, z)
    assert slope.abs().max() < 1e-9


def test_z_before_a_relu_is_the_best_of_a_grid():
    terms = Terms(alpha=2.0, gamma=0.7)
    m, p = torch.randn(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    grid = torch.linspace(-8, 8, 16001, dtype=torch.float64)[:, None]
    cost = 2.0 * (grid - m).square() + 0.7 * (p - grid.clamp(min=0)).square()
    best = grid[cost.argmin(0), 0]
    torch.testing.assert_close(sparsellm.update_z_relu(m, p, terms), best, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("gated", "act"), [(True, silu), (True, gelu), (False, relu), (False, gelu)]
)
def test_a_turn_of_the_auxiliaries_lowers_the_objective(gated, act):
    ffn, x = block(gated, act)
    terms, sparse, aux = Terms(), first(ffn, x), Auxiliaries.of(ffn, x)
    p = ffn.neurons(aux.s, aux.z)
    losses = [float(objective(sparse, aux, p, terms))]
    for _ in range(4):
        inner = sparsellm.curvature(sparse.down, terms, "p")
        y = aux.y - sparse.down_bias
        p = sparsellm.update_p(sparse.neurons(aux.s, aux.z), y, sparse.down, inner, terms)
        losses.append(float(objective(sparse, aux, p, terms)))
        sparsellm.update_auxiliaries(aux, sparse, terms, chunk=37)  # the same p again
        losses.append(float(objective(sparse, aux, p, terms)))
    assert all(b < a for a, b in itertools.pairwise(losses))


@pytest.mark.parametrize(("gated", "act"), [(True, silu), (False, relu), (False, gelu)])
def test_the_refits_have_no_slope_left(gated, act):
    ffn, x = block(gated, act)
    terms, aux = Terms(), Auxiliaries.of(ffn, x)
    sparse = first(ffn, x)
    inner = sparsellm.curvature(sparse.down, terms, "p")
    h = sparse.neurons(aux.s, aux.z)
    p = sparsellm.update_p(h, aux.y - ffn.down_bias, sparse.down, inner, terms)
    sums = sparsellm.update_auxiliaries(aux, sparse, terms)
    gram = x.T @ x
    full = replace(
        ffn,
        up=sparsellm.refit(ffn.up, gram, sums.zx, 0.0, "up").requires_grad_(),
        down=sparsellm.refit(ffn.down, sums.pp, sums.yp, 0.0, "down").requires_grad_(),
        gate=sparsellm.refit(ffn.gate, gram, sums.sx, 0.0, "gate").requires_grad_()
        if gated
        else None,
    )
    weights = [w for w in (full.up, full.down, full.gate) if w is not None]
    for slope in torch.autograd.grad(objective(full, aux, p, terms), weights):
        assert slope.abs().max() < 1e-6


def test_tokens_in_chunks_are_the_same():
    ffn, x = block()
    sparse = first(ffn, x)
    found = []
    for chunk in (7, 1000):
        aux = Auxiliaries.of(ffn, x, chunk)
        found.append((sparsellm.update_auxiliaries(aux, sparse, Terms(), chunk=chunk), aux))
    (a, one), (b, other) = found
    for name in ("pp", "zx", "yp", "sx"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name))
    torch.testing.assert_close(one.s, other.s)
    torch.testing.assert_close(one.z, other.z)


# ---- the whole


def run(ffn, x, steps, share=0.7):
    start = first(ffn, x, share=share)
    gram = x.T @ x
    again = lambda full, pp: pruned(full, gram, pp, share)  # noqa: E731
    return start, *sparsellm.alternate(ffn, start, x, again, steps=steps)


def test_one_step_is_what_it_was_given():
    ffn, x = block()
    start, best, errors = run(ffn, x, 1)
    assert best is start
    assert len(errors) == 1


@pytest.mark.parametrize(
    ("gated", "act"), [(True, silu), (True, gelu), (False, relu), (False, gelu)]
)
def test_more_steps_bring_the_output_nearer_and_never_further(gated, act):
    gains = []
    for seed in range(6):
        ffn, x = block(gated, act, seed)
        start, best, errors = run(ffn, x, 6)
        aux = Auxiliaries.of(ffn, x)
        assert sparsellm.output_error(best, aux) == min(errors)
        assert errors[0] == sparsellm.output_error(start, aux)
        gains.append(min(errors) / errors[0])
    assert max(gains) <= 1
    assert sum(gains) / len(gains) < 0.97


def test_counts_stay_exact():
    ffn, x = block()
    _, best, _ = run(ffn, x, 4)
    assert [int((w == 0).sum()) for w in (best.up, best.gate, best.down)] == [89, 89, 89]


def test_biases_are_left_alone():
    ffn, x = block()
    _, best, _ = run(ffn, x, 4)
    assert best.up_bias is ffn.up_bias
    assert best.down_bias is ffn.down_bias
    assert best.gate_bias is ffn.gate_bias
