"""NutePrune: exact counts, the masked model is the exported one, teachers as its authors choose
them.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from paths import authors_numbers
from problems import check, problem, uniform
from tiny_models import tiny_model
from torch import nn

from prunekit.architecture.sizes import Sizes
from prunekit.errors import ConfigError
from prunekit.pruners.nuteprune import Teachers, teacher_index
from prunekit.registry import pruners
from prunekit.training.constraints import SizeConstraint
from prunekit.training.distillation import Distillation
from prunekit.training.learned_masks import LearnedMasks
from prunekit.training.low_rank import Updates, inject
from prunekit.training.masks_and_updates import gates_around_updates

FAST = {"steps": 4, "batch": 2, "micro_batch": 1, "warmup_steps": 0, "r": 2}


def prune(model, tokens, share=0.3, ranking="global", **options):
    ratio = uniform(share, "prunable", ranking=ranking)
    pruner = pruners.build({"name": "nuteprune", **FAST, **options})
    return pruner(problem(model, tokens, ratio=ratio))


def test_ratio_zero_changes_nothing(tokens):
    llama = tiny_model("llama")
    before = copy.deepcopy(llama.state_dict())
    assert prune(llama, tokens, share=0.0).kept == {}
    assert all(torch.equal(v, before[k]) for k, v in llama.state_dict().items())


@pytest.mark.parametrize(
    ("arch", "kinds"),
    [("llama", ["heads", "neurons", "hidden"]), ("gpt2", ["heads", "neurons"])],
)
def test_the_budget_is_kept_and_masked_is_exported(arch, kinds, tokens, masked):
    model = tiny_model(arch, layers=3)
    groups = problem(model).units(kinds)
    prunable = Sizes(model, groups).prunable()
    before = sum(p.numel() for p in model.parameters())
    out = prune(model, tokens, kinds=kinds)
    removed = before - sum(p.numel() for p in model.parameters())
    assert 0.25 * prunable < removed <= 0.3 * prunable
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, masked["logits"], rtol=1e-4, atol=1e-4)
    assert out.notes["teachers"] == [-1] * 8
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("options", [{}, {"layer_weight": 0.5, "temperature": 2.0}])
def test_what_is_minimised_is_the_papers_sum(options, tokens, monkeypatch):
    """0.9 of the hidden states' error and 0.1 of the KL that is summed over a sample's tokens, by
    what a token's KL of weight 1 needs beside it; and the constraint.
    """
    seen = {}

    def learn(masks, updates, examples, recipe, constraint, lr, objective):
        with objective([]) as how:
            seen.update(how, value=float(how["penalty"](masks.model, 7).detach()))
        seen["constraint"] = float(constraint(masks.model, 7).detach())
        raise InterruptedError

    monkeypatch.setattr("prunekit.pruners.nuteprune.learn_with_updates", learn)
    monkeypatch.setattr(Teachers, "layer_loss", lambda self: torch.tensor(5.0))
    with pytest.raises(InterruptedError):
        prune(tiny_model("llama"), tokens, **options)
    weight = options.get("layer_weight", 0.9)
    error = weight * 5 / ((1 - weight) * tokens.shape[1])
    assert seen["value"] == pytest.approx(error + seen["constraint"])
    assert seen["distillation"] == Distillation(1.0, options.get("temperature", 2 / 3))


def test_teachers_follow_as_those_of_the_authors():
    golden = authors_numbers("nuteprune")
    sparsity, index = golden["teacher.0.5.sparsity"], golden["teacher.0.5.index"]
    rows = list(itertools.pairwise(zip(sparsity.tolist(), index.tolist(), strict=True)))
    before = [(s, theirs) for (s, _), (now, theirs) in rows if now < 0.5]  # recorded a step ago
    assert len(before) > 200
    assert all(teacher_index(int(s * 100), 10, None) == theirs for s, theirs in before)


def test_teachers_go_back_to_the_dense_model():
    walk = [teacher_index(13, 10, k / 50) for k in range(50)]
    assert walk[0] == 3
    assert walk[-1] == -1
    assert all(a - b in (0, 1) for a, b in itertools.pairwise(walk))
    assert {walk.count(i) for i in (3, 2, 1, 0, -1)} == {10}


@pytest.fixture
def taught(tokens):
    """A model with masks, updates and teachers on it."""
    model = tiny_model("llama")
    groups = problem(model).units(["heads", "neurons", "hidden"])
    masks = LearnedMasks(model, groups, seed=0)
    sizes = Sizes(model, groups)
    constraint = SizeConstraint(masks, sizes.prunable() // 4, sizes.prunable(), 10, "lagrangian")
    teachers = Teachers(masks, constraint, steps=20, gap=10, error="plain")
    with masks.on_model():
        inject(model, Updates(["model.layers.0.self_attn.q_proj"], 2, 2, 0.0))
        gates_around_updates(model)
        updates = [p for p in model.parameters() if p.requires_grad]
        nn.init.normal_(updates[1])
        with teachers.on_model(updates):
            yield teachers


def test_without_snapshots_the_dense_model_teaches(taught, tokens):
    model = taught.masks.model.train()
    with torch.no_grad():
        taught.masks.log_alpha.fill_(4.6)
        student = model(input_ids=tokens).logits
    plain = tiny_model("llama")
    with torch.no_grad():
        expected = plain(tokens).logits
    torch.testing.assert_close(taught.logits({}), expected, rtol=1e-4, atol=1e-5)
    assert (student - expected).abs().max() > 1e-3
    assert taught.used == [-1]
    assert model.training


def test_a_teacher_that_is_the_student_leaves_no_error(taught, tokens, monkeypatch):
    model, masks = taught.masks.model.train(), taught.masks
    values = [p.detach().clone() for p in taught.updates]
    ones = torch.ones_like(masks.log_alpha)
    taught.snapshots = [(ones, values)] * 10
    monkeypatch.setattr(masks, "draw", lambda: masks.set(ones))
    with torch.no_grad():
        student = model(input_ids=tokens).logits
    assert taught.used == [0]
    torch.testing.assert_close(taught.logits({}), student)
    assert float(taught.layer_loss()) == 0


def test_pads_have_no_part_in_the_error(taught, tokens):
    model, there = taught.masks.model.train(), torch.ones_like(tokens)
    there[:, :5] = 0
    found = []
    for pad in (0, 50):
        taught.masks.generator.manual_seed(0)
        with torch.no_grad():
            model(input_ids=tokens.masked_fill(there == 0, pad), attention_mask=there)
        found.append(float(taught.layer_loss()))
    assert found[0] > 0
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_channels_that_the_student_has_not_have_no_part_in_the_error(taught):
    student, teacher = torch.full((1, 4, 8), 2.0), torch.full((1, 4, 8), 3.0)
    student[..., 3], teacher[..., 3] = 0, 100
    taught._hidden = {False: [student], True: [teacher]}
    assert float(taught.layer_loss()) == 1


def test_the_relative_error_knows_no_size(taught):
    """A token of 3 and one of 3,000, of each of which a third is missing; a pad; a channel less."""
    teacher = torch.full((1, 3, 8), 3.0) * torch.tensor([1.0, 1000.0, 1.0])[:, None]
    student = teacher * 2 / 3
    student[..., 3], teacher[..., 3] = 0, 1e6
    taught._hidden = {False: [student] * 2, True: [teacher] * 2}
    taught._tokens = torch.tensor([[1, 1, 0]])
    taught.relative = True
    assert float(taught.layer_loss()) == pytest.approx(2 / 9)


def test_the_error_of_half_precision_is_a_single_precision_number(taught):
    """The square of 300 is beyond float16."""
    states = torch.full((1, 4, 8), 300.0, dtype=torch.float16)
    taught._hidden = {False: [states], True: [torch.zeros_like(states)]}
    assert float(taught.layer_loss()) == 300**2


def test_snapshots_stand_a_percent_apart(taught, tokens):
    model = taught.masks.model.train()
    with torch.no_grad():
        model(input_ids=tokens)
        start = len(taught.snapshots)
        taught.masks.log_alpha[::9] = -4.0
        sparsity = float(taught.constraint.sparsity())
        model(input_ids=tokens)
    assert start < len(taught.snapshots) == int(sparsity * 100)


def test_gates_between_0_and_1_need_rmsnorm():
    with pytest.raises(ConfigError, match="leave out kind hidden"):
        check("nuteprune", problem(tiny_model("gpt2"), ratio=uniform(0.2, "prunable")))
