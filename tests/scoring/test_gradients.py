"""Gradients of every weight, and a bar that tells how far they are."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model

from prunekit.activations.runs import ModelRun
from prunekit.scoring import gradients


class Recorded:
    """A bar that remembers where it stood."""

    made: list[Recorded] = []  # noqa: RUF012  (of one test)

    def __init__(self, total, **options):
        self.total, self.n, self.seen = total, 0.0, []
        Recorded.made.append(self)

    def update(self, n):
        assert n >= 0
        self.n += n
        self.seen.append(self.n)

    def close(self):
        pass


@pytest.fixture
def bars(monkeypatch):
    Recorded.made = []
    monkeypatch.setattr(gradients, "tqdm", Recorded)
    return Recorded.made


@pytest.mark.parametrize(
    ("squares", "names", "batch", "passes"),
    [
        (False, "q_proj.weight", None, [4]),  # all samples at once
        (False, "q_proj.weight", 2, [2, 4]),
        (True, "q_proj.weight", None, [4]),  # squares of linear layers: as many at once
        (True, "q_proj.weight", 3, [3, 4]),
        (True, "layernorm.weight", None, [1, 2, 3, 4]),  # of others: one a sample
    ],
)
def test_the_bar_moves_with_every_block_and_ends_at_the_samples(
    bars, tokens, squares, names, batch, passes
):
    model = tiny_model("llama", layers=3)
    wanted = [n for n, _ in model.named_parameters() if n.endswith(names)]
    run = ModelRun(model, tokens)
    gradients.backward(model, wanted, run, lambda *_: None, squares=squares, batch=batch)
    (bar,) = bars
    assert bar.total == len(tokens)
    assert bar.n == pytest.approx(len(tokens))
    assert bar.seen == sorted(bar.seen)
    first = [n for n in bar.seen if n < passes[0] - 1e-6]
    assert len(set(first)) >= 5, "three blocks forwards, three backwards"
    assert all(any(abs(n - done) < 1e-6 for n in bar.seen) for done in passes)


def test_weights_of_both_sorts_have_a_bar_each(bars, tokens):
    model = tiny_model("llama", layers=2)
    wanted = [n for n, _ in model.named_parameters() if "layers" in n]
    gradients.backward(model, wanted, ModelRun(model, tokens), lambda *_: None, squares=True)
    assert [bar.n for bar in bars] == pytest.approx([len(tokens)] * 2)


def test_no_hook_stays(bars, tokens):
    model = tiny_model("llama", layers=2)
    wanted = ["model.layers.0.mlp.up_proj.weight"]
    gradients.backward(model, wanted, ModelRun(model, tokens), lambda *_: None, squares=False)
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_a_weight_that_only_an_earlier_batch_reached_keeps_that_gradient(bars, tokens):
    """Delivered once all is over, not lost with the last batch."""
    model = tiny_model("llama", layers=1)
    mlp = model.model.layers[0].mlp
    whole = mlp.forward
    calls = []

    def only_once(x):
        calls.append(None)
        return whole(x) if len(calls) == 1 else x * 0

    name = "model.layers.0.mlp.up_proj.weight"
    found = {}

    def sink(n, weight, gradient, _):
        found[n] = gradient.clone()

    mlp.forward = only_once
    wanted = [name, "model.layers.0.self_attn.q_proj.weight"]
    gradients.backward(model, wanted, ModelRun(model, tokens), sink, squares=False, batch=2)
    del mlp.forward
    model.zero_grad()
    loss = model(input_ids=tokens[:2], labels=tokens[:2]).loss / 2
    loss.backward()
    assert torch.allclose(found[name], model.get_parameter(name).grad, atol=1e-6)


def by_sample(model, names, tokens):
    """name -> mean gradient and mean squared gradient over samples, one backward each."""
    each = {name: [] for name in names}
    for sample in tokens.split(1):
        model.zero_grad()
        model(input_ids=sample, labels=sample).loss.backward()
        for name in names:
            each[name].append(model.get_parameter(name).grad.clone())
    stacked = {name: torch.stack(grads) for name, grads in each.items()}
    return {name: (g.mean(0), g.square().mean(0)) for name, g in stacked.items()}


class OfSomeSamples(torch.nn.Module):
    """A layer that is given some of the samples only: of the first batch of two one, both of the
    second.
    """

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(64, 64, bias=False)

    def forward(self, x):
        chosen = x.mean((1, 2)) > self.above
        out = torch.zeros_like(x)
        out[chosen] = self.layer(x[chosen])
        return out


@pytest.mark.parametrize("batch", [None, 2])
def test_a_layer_that_one_batch_reached_in_part_goes_sample_by_sample(bars, tokens, batch):
    torch.manual_seed(0)
    model = tiny_model("llama", layers=1)
    model.model.layers[0].mlp = part = OfSomeSamples()
    means = []
    part.above = -torch.inf
    hook = part.register_forward_pre_hook(lambda _, args: means.append(args[0].mean((1, 2))))
    model(tokens)
    hook.remove()
    order = means[0].argsort()
    part.above = (means[0][order[0]] + means[0][order[1]]) / 2
    tokens = tokens[order]
    name = "model.layers.0.mlp.layer.weight"
    found = {}

    def sink(n, weight, *values):
        assert n not in found
        found[n] = [v.clone() for v in values]

    gradients.backward(model, [name], ModelRun(model, tokens), sink, squares=True, batch=batch)
    for got, want in zip(found[name], by_sample(model, [name], tokens)[name], strict=True):
        assert want.norm() > 0
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-9)


class Routed(torch.nn.Module):
    """Two experts share the tokens by their first channel's sign; no token takes the third."""

    def __init__(self):
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(64, 64, bias=False) for _ in range(3))

    def forward(self, x):
        flat, out = x.flatten(0, 1), torch.zeros_like(x).flatten(0, 1)
        first = flat[:, 0] > 0
        for expert, rows in zip(self.experts, (first, ~first)):
            out[rows] = expert(flat[rows])
        return out.view_as(x)


@pytest.mark.parametrize("squares", [False, True])
def test_experts_get_the_gradients_of_their_tokens_and_idle_ones_zeros(bars, tokens, squares):
    """Rows of a routed expert do not tell their sample: those weights go sample by sample."""
    torch.manual_seed(0)
    model = tiny_model("llama", layers=1)
    model.model.layers[0].mlp = Routed()
    names = [f"model.layers.0.mlp.experts.{i}.weight" for i in range(3)]
    found = {}

    def sink(n, weight, gradient, mean_squared):
        assert n not in found
        found[n] = gradient.clone(), None if mean_squared is None else mean_squared.clone()

    gradients.backward(model, names, ModelRun(model, tokens), sink, squares=squares, batch=2)
    assert set(found) == set(names)
    assert not found[names[2]][0].any()
    for name, (mean, squared) in by_sample(model, names[:2], tokens).items():
        assert mean.norm() > 0
        assert torch.allclose(found[name][0], mean, atol=1e-6)
        assert not squares or torch.allclose(found[name][1], squared, atol=1e-7)
