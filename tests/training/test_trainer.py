"""One trainer for all: the objective of a step, zeros, parameters outside of the model, and a model
that comes back as it was.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor, nn
from torch.nn import functional as F

from prunekit.data.training_examples import Example, collate
from prunekit.errors import ConfigError
from prunekit.training.distillation import Distillation
from prunekit.training.recipe import Recipe
from prunekit.training.trainer import train

VOCABULARY = 50
RECIPE = Recipe(
    lr=1e-2,
    warmup_steps=0,
    epochs=1,
    max_steps=3,
    batch=4,
    micro_batch=2,
    eval_every=1,
    log_every=1,
    seed=0,
)
UP = "model.layers.1.mlp.up_proj.weight"


def llama(seed: int = 0) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=2, **sizes)
    config.initializer_range = 0.3
    return LlamaForCausalLM(config).eval()


class Plain(nn.Module):
    """A model of other people: its forward takes no count of labels, and it gives a dict."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.head = nn.Linear(8, VOCABULARY)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool = False,
    ) -> SimpleNamespace | dict[str, Tensor]:
        logits = self.head(self.embed(input_ids))
        if labels is None:
            return SimpleNamespace(logits=logits)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return Output(loss=loss, logits=logits)


class Output(dict):
    def __getattr__(self, name: str) -> Tensor:
        return self[name]


def examples(count: int = 4) -> list[Example]:
    """Of 12 tokens, of which 11, 10, 9, ... are learnt."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(3, VOCABULARY, (count, 12), generator=generator).tolist()
    return [
        {"input_ids": row, "labels": [-100] * (1 + i % 8) + row[1 + i % 8 :]}
        for i, row in enumerate(rows)
    ]


def objective(model: nn.Module, teacher: nn.Module, rows: list[Example], d: Distillation) -> Tensor:
    """The plain formula, a mean over the learnt tokens of the rows."""
    batch = collate(rows)
    labels = batch.pop("labels")
    learnt = labels[:, 1:] != -100
    log_q = model(**batch).logits[:, :-1][learnt]
    log_p = teacher(**batch).logits[:, :-1][learnt].detach()
    ce = F.cross_entropy(log_q, labels[:, 1:][learnt])
    p, q = ((x / d.temperature).log_softmax(-1) for x in (log_p, log_q))
    p, q = (q, p) if d.direction == "reverse" else (p, q)
    kl = F.kl_div(q, p, reduction="batchmean", log_target=True)
    return (1 - d.weight) * ce + d.weight * d.temperature**2 * kl


def gradient_norm(model: nn.Module) -> float:
    return math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))


@pytest.mark.parametrize(
    "distillation",
    [
        Distillation(0.3, 2.0),
        Distillation(1.0, 1.0),
        Distillation(0.0, 3.0),
        Distillation(0.7, 2.0, "reverse"),
    ],
)
def test_a_step_with_a_teacher_is_the_plain_formula_over_all_its_micro_batches(distillation):
    model, teacher, plain = llama(), llama(1), llama()
    loss = objective(plain, teacher, examples(), distillation)
    loss.backward()
    recipe = replace(RECIPE, max_steps=1)
    history = train(model, examples(), recipe, teacher=teacher, distillation=distillation)
    assert history.curve[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert history.curve[0]["grad_norm"] == pytest.approx(gradient_norm(plain), rel=1e-4)
    assert history.best_step is None


class Swallowing(Plain):
    """Its forward takes a count of labels and does not look at it."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **_: object):
        return super().forward(input_ids, labels=labels)


@pytest.mark.parametrize("model", [Plain, Swallowing])
def test_every_label_of_a_step_counts_alike_whatever_loss_the_model_itself_gives(model):
    teacher, distillation = llama(), Distillation(0.5, 2.0)
    plain = model()
    loss = objective(plain, teacher, examples(), distillation)
    loss.backward()
    history = train(
        model(),
        examples(),
        replace(RECIPE, max_steps=1),
        teacher=teacher,
        distillation=distillation,
        penalty=lambda model, step: torch.tensor(5.0),
    )
    assert history.curve[0]["loss"] == pytest.approx(loss.item() + 5, rel=1e-5)
    assert history.curve[0]["grad_norm"] == pytest.approx(gradient_norm(plain), rel=1e-5)


@pytest.mark.parametrize("arch", ["gpt2", "rwkv"])
def test_a_step_does_not_depend_on_how_it_is_cut(arch):
    """Of models that count positions from the first token, or read what comes before."""
    rows = [{k: v[: 12 - 3 * i] for k, v in e.items()} for i, e in enumerate(examples(3))]
    rows += [{k: v + v for k, v in e.items()} for e in examples(1)]
    found = []
    for micro_batch in (4, 2, 1):
        model = tiny_model(arch)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        recipe = replace(RECIPE, max_steps=1, micro_batch=micro_batch)
        record = train(model, rows, recipe).curve[0]
        found.append([record["loss"], record["grad_norm"]])
    assert found[1:] == [pytest.approx(found[0], rel=1e-4)] * 2


def test_a_model_that_is_its_own_teacher_stays_as_it_is():
    model = llama()
    before = copy.deepcopy(model.state_dict())
    only = Distillation(weight=1.0, temperature=2.0)
    history = train(model, examples(), RECIPE, teacher=llama(), distillation=only)
    steps = [r for r in history.curve if "loss" in r]
    assert [(r["loss"], r["grad_norm"]) for r in steps] == [(0.0, 0.0)] * 3
    assert all(torch.equal(before[n], w) for n, w in model.state_dict().items())


def test_a_penalty_counts_once_a_step_and_knows_the_step():
    seen = []

    def penalty(model: nn.Module, step: int) -> Tensor:
        seen.append((type(model).__name__, step))
        return 2 * model.get_parameter(UP).square().sum()

    recipe = replace(RECIPE, max_steps=1)
    model, plain = llama(), llama()
    value = 2 * plain.get_parameter(UP).square().sum()
    batch = collate(examples())
    total = plain(**batch, num_items_in_batch=11 + 10 + 9 + 8).loss + value
    total.backward()
    history = train(model, examples(), recipe, penalty=penalty)
    assert history.curve[0]["loss"] == pytest.approx(total.item(), rel=1e-4)
    assert history.curve[0]["grad_norm"] == pytest.approx(gradient_norm(plain), rel=1e-4)
    train(llama(), examples(8), replace(RECIPE, max_steps=2), penalty=penalty)
    assert seen == [("LlamaForCausalLM", s) for s in (0, 0, 0, 0, 1, 1)]


def test_parameters_outside_have_a_rate_a_direction_and_a_schedule_of_their_own():
    names = ("down", "up", "constant", "frozen")
    z = {n: nn.Parameter(torch.zeros(2)) for n in names}
    grads = []

    def penalty(model: nn.Module, step: int) -> Tensor:
        grads.append(z["down"].grad is None)
        return sum(z[n].sum() for n in names[:3])

    model = llama().requires_grad_(False)
    groups = [
        {"params": [z["down"]], "lr": 0.5},
        {"params": [z["up"]], "lr": 0.25, "maximize": True},
        {"params": [z["constant"]], "lr": 0.5, "constant": True},
        {"params": [z["frozen"]], "lr": 0.5},
    ]
    recipe = replace(RECIPE, max_steps=4, warmup_steps=2)
    before = copy.deepcopy(model.state_dict())
    history = train(model, examples(8), recipe, penalty=penalty, parameters=groups)
    # The gradient is 1 throughout, so a step of Adam is as long as its learning rate.
    found = {n: p.detach().tolist() for n, p in z.items()}
    factors = 0 + 0.5 + 1 + 0.5
    want = {"down": -0.5 * factors, "up": 0.25 * factors, "constant": -0.5 * 4, "frozen": 0}
    assert found == {n: pytest.approx([w, w], abs=1e-5) for n, w in want.items()}
    assert grads == [True, False] * 4, "a step's gradients are gone before the next"
    assert all(p.grad is None for p in z.values())
    assert all(torch.equal(before[n], w) for n, w in model.state_dict().items())
    rates = [r["learning_rate"] for r in history.curve if "loss" in r]
    assert rates == pytest.approx([0, 0.25, 0.5, 0.25])


def test_zeros_stay_zero_at_every_step_and_the_rest_learns():
    model = llama()
    mask = torch.rand(24, 16, generator=torch.Generator().manual_seed(2)) > 0.5
    with torch.no_grad():
        model.get_parameter(UP).mul_(mask)
    before = model.get_parameter(UP).detach().clone()
    zeros = []

    def look(model: nn.Module, step: int) -> Tensor:
        zeros.append(not model.get_parameter(UP)[~mask].any())
        return torch.tensor(0.0)

    train(model, examples(), RECIPE, keep={UP: mask}, penalty=look)
    weight = model.get_parameter(UP)
    assert zeros == [True] * 6
    assert not weight[~mask].any()
    assert (weight[mask] != before[mask]).all()


def test_what_must_stay_zero_has_no_say_in_the_clipped_norm():
    held, frozen = llama(), llama()
    shape = held.get_parameter(UP).shape
    with torch.no_grad():
        frozen.get_parameter(UP).zero_()
    frozen.get_parameter(UP).requires_grad_(False)
    mask = torch.zeros(shape, dtype=torch.bool)
    curves = [
        train(held, examples(), RECIPE, keep={UP: mask}).curve,
        train(frozen, examples(), RECIPE).curve,
    ]
    assert curves[0] == curves[1]
    assert all(torch.equal(w, held.state_dict()[n]) for n, w in frozen.state_dict().items())


def test_validation_is_plain_cross_entropy_and_the_best_step_counts_for_all_parameters():
    model, z = llama(), nn.Parameter(torch.zeros(1))
    with torch.no_grad():
        loss = float(model(**collate(examples())).loss)
    history = train(
        model,
        examples(),
        replace(RECIPE, lr=1e-30),  # the model stands still, so the first step is the best
        validation=examples(),
        teacher=llama(1),
        penalty=lambda model, step: z.sum(),
        parameters=[{"params": [z], "lr": 1.0, "constant": True}],
    )
    seen = [r["eval_loss"] for r in history.curve if "eval_loss" in r]
    assert seen == pytest.approx([loss] * 3)
    assert history.best_step == 1
    assert z.tolist() == pytest.approx([-1.0])


@pytest.mark.parametrize("adds_up", [True, False])
def test_every_label_of_the_validation_counts_alike(adds_up):
    """However many there are in a micro-batch, of which the last is not full."""
    model, held_out = llama(), examples(5)
    if not adds_up:
        plain = model.forward
        model.forward = lambda input_ids, attention_mask=None, labels=None: plain(
            input_ids=input_ids, attention_mask=attention_mask, labels=labels
        )
    with torch.no_grad():
        loss = float(llama()(**collate(held_out)).loss)
    how = replace(RECIPE, lr=1e-30, max_steps=1, batch=2, micro_batch=2)
    curve = train(model, examples(), how, validation=held_out).curve
    assert [r["eval_loss"] for r in curve if "eval_loss" in r] == pytest.approx([loss])


def test_the_model_comes_back_as_it_was_even_from_a_failure():
    def fail(model: nn.Module, step: int) -> Tensor:
        raise RuntimeError("a penalty that fails")

    for dtype in (torch.float32, torch.bfloat16):
        model = llama().to(dtype)
        keys, config = set(model.__dict__), copy.deepcopy(model.config.to_dict())
        with pytest.raises(RuntimeError, match="a penalty that fails"):
            train(model, examples(), RECIPE, keep={UP: torch.ones(24, 16).bool()}, penalty=fail)
        assert set(model.__dict__) == keys
        assert model.config.to_dict() == config
        assert not model.training
        assert not model.get_parameter(UP)._backward_hooks
        assert all(p.grad is None for p in model.parameters())


def test_only_the_bar_is_printed(capfd):
    train(llama(), examples(), RECIPE, validation=examples())
    out, err = capfd.readouterr()
    assert out == ""
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip()]
    assert all(line.startswith(("training", "validation")) for line in lines), lines
    assert lines[0].startswith("training:   0%")
    assert "3/3 steps" in lines[-1]
    assert "loss=" in lines[-1]


@pytest.mark.parametrize(("warmup", "warned"), [(0, False), (2, False), (3, True), (100, True)])
def test_a_rate_that_is_never_reached_is_said(warmup, warned, caplog):
    train(llama(), examples(), replace(RECIPE, warmup_steps=warmup))
    assert (f"3 steps, of which warmup_steps={warmup}" in caplog.text) == warned


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "nothing to train"),
        (
            {"distillation": Distillation(), "parameters": [{"params": [nn.Parameter()], "lr": 1}]},
            "needs a teacher",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        train(llama().requires_grad_(False), examples(), RECIPE, **options)
