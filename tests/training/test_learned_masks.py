"""Learned masks: drawn for each forward of the training, gradients handed on, folded at the end."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model

from prunekit import graph
from prunekit.architecture.sizes import Sizes
from prunekit.training.constraints import KindConstraint, SizeConstraint, warn_of_missed
from prunekit.training.hard_concrete import LIMITS, deterministic, open_probability, sample
from prunekit.training.learned_masks import LearnedMasks


@pytest.fixture
def masks():
    model = tiny_model("llama")
    groups = [g for g in graph.discover(model) if g.kind in ("heads", "neurons", "blocks")]
    found = LearnedMasks(model, groups, seed=0)
    with torch.no_grad():
        found.log_alpha.copy_(torch.linspace(-3, 3, len(found.log_alpha)))
    return found


@pytest.mark.parametrize(("step", "share"), [(0, 0.0), (4, 0.4), (10, 1.0), (50, 1.0)])
def test_the_target_grows_during_the_warmup(masks, step, share):
    targets = {"heads": 0.25, "neurons": 0.5, "blocks": 0.125}
    constraint = KindConstraint(masks, targets, 10, "lagrangian")
    with torch.no_grad():
        constraint.multipliers.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    closed = {g.name: 1 - open_probability(a).mean() for g, a in masks_by_group(masks)}
    value = 0.0
    for (kind, target), (first, second) in zip(
        targets.items(), constraint.multipliers.tolist(), strict=True
    ):
        gaps = [float(closed[g.name]) - share * target for g in masks.groups if g.kind == kind]
        value += first * sum(gaps) / len(gaps) + second * sum(x * x for x in gaps) / len(gaps)
    assert constraint(masks.model, step).item() == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize(("missed", "said"), [(0.019, ""), (0.03, "53.0 %"), (-0.2, "30.0 %")])
def test_masks_that_miss_their_target_are_told(missed, said, caplog):
    warn_of_missed("neurons", missed, 0.5)
    assert (f"expect {said} of the neurons to go, and 50.0 % go" in caplog.text) == bool(said)
    assert bool(caplog.text) == bool(said)


def masks_by_group(masks):
    return zip(masks.groups, masks.log_alphas().values(), strict=True)


def test_gradients_reach_log_alpha_as_through_the_gates(masks, tokens, monkeypatch):
    """Of two micro-batches with noise of their own, against gates that are part of the graph."""
    noises = torch.rand(2, len(masks.log_alpha), generator=torch.Generator().manual_seed(3))
    drawn = iter(noises)
    masks.model.train()
    with masks.on_model(), monkeypatch.context() as patch:
        patch.setattr(torch, "rand", lambda *_, **__: next(drawn))
        for _ in noises:
            masks.model(tokens, labels=tokens).loss.backward()
    plain = masks.log_alpha.detach().clone().requires_grad_()
    for noise in noises:
        z = sample(plain, noise).split([p.units for p in masks.parts])
        named = dict(zip((p.name for p in masks.parts), z, strict=True))
        with graph.gated(masks.model, masks.parts, named):
            masks.model(tokens, labels=tokens).loss.backward()
    torch.testing.assert_close(masks.log_alpha.grad, plain.grad, rtol=1e-4, atol=1e-7)
    assert plain.grad.abs().max() > 0


def test_training_draws_and_evaluation_does_not(masks, tokens):
    def logits():
        with torch.no_grad():
            return masks.model(tokens).logits

    with masks.on_model():
        masks.model.train()
        assert not torch.equal(logits(), logits())
        masks.model.eval()
        assert torch.equal(logits(), logits())
        alphas = masks.log_alphas()
        assert torch.equal(masks.z["neurons.1"], deterministic(alphas["neurons.1"]))


def test_log_alpha_stays_between_its_limits(masks):
    with torch.no_grad():
        masks.log_alpha.mul_(100)
    masks.draw()
    assert masks.log_alpha.min() == LIMITS[0]
    assert masks.log_alpha.max() == LIMITS[1]


def test_what_is_held_is_what_is_exported(masks, tokens):
    kept = {g.name: torch.arange(g.units) % 3 > 0 for g in masks.groups}
    kept["blocks"] = torch.tensor([True, False])
    masks.hold(kept)
    masks.model.train()
    with masks.on_model(), torch.no_grad():
        masked = masks.model(tokens).logits
    masks.fold()
    graph.remove(masks.model.eval(), kept)
    with torch.no_grad():
        torch.testing.assert_close(masks.model(tokens).logits, masked, rtol=1e-4, atol=1e-4)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in masks.model.modules())


def gaps_after(constraint, step):
    constraint.bring_to_target(step)
    share = min(1.0, step / 10)
    return torch.cat([g.flatten() for g in constraint.gaps(share)])


@pytest.mark.parametrize("step", [3, 10, 50])
def test_an_exact_constraint_leaves_no_gap_and_no_penalty(masks, step):
    targets = {"heads": 0.25, "neurons": 0.5, "blocks": 0.3}
    by_kind = KindConstraint(masks, targets, 10, "exact")
    assert gaps_after(by_kind, step).abs().max() < 1e-4
    for part in masks.offset.split(masks.units):
        assert len(part.unique()) == 1
    sizes = Sizes(masks.model, masks.groups)
    of_all = SizeConstraint(masks, sizes.prunable() // 3, sizes.prunable(), 10, "exact")
    assert gaps_after(of_all, step).abs().max() < 1e-4
    assert len(masks.offset.unique()) == 1
    assert float(of_all(masks.model, step)) == 0
    assert [g["params"] for g in of_all.parameters(0.1)] == [[masks.log_alpha]]


def test_masks_begin_in_an_order():
    """From the lowest score on they close, and few are undecided."""
    model = tiny_model("llama")
    groups = [g for g in graph.discover(model) if g.kind in ("heads", "neurons")]
    order = {g.name: torch.randperm(g.units).float() for g in groups}
    masks = LearnedMasks(model, groups, seed=0, order=order, bounded=False)
    for name, began in masks.log_alphas().items():
        assert torch.equal(began.argsort(), order[name].argsort())
    KindConstraint(masks, {"heads": 0.5, "neurons": 0.5}, 0, "exact").bring_to_target(0)
    masks.draw()
    z = masks.z["neurons.0"].detach()
    assert ((z > 0) & (z < 1)).float().mean() < 0.4
    lowest, highest = order["neurons.0"].argsort().chunk(2)
    assert z[lowest[: len(lowest) // 2]].mean() < 0.1
    assert z[highest[len(highest) // 2 :]].mean() > 0.9
    assert masks.log_alpha.abs().max() > LIMITS[1]  # what is drawn is bounded, it is not
