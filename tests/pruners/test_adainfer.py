"""AdaInfer: who leaves where, what is skipped, caches that are filled, thresholds, checkpoints."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from problems import check, problem, uniform
from tiny_models import logits, tiny_model

import prunekit
from prunekit import checkpoint
from prunekit.checkpoint.remote_code.early_exit import EarlyExit
from prunekit.errors import ConfigError
from prunekit.pruners.adainfer import fitted, lowest_threshold, observed, outcome, set_threshold
from prunekit.registry import pruners


def leave_early(model, tokens, **options):
    """The pruner's answer, and the module that it put in."""
    out = pruners.build({"name": "adainfer", "agreement": 0.3, **options})(problem(model, tokens))
    return out, next(m for m in model.modules() if type(m).__name__ == "EarlyExit")


@pytest.fixture
def llama():
    return tiny_model("llama", layers=5)


@pytest.fixture
def text():
    """(10, 24) token ids below 100."""
    return torch.randint(8, 100, (10, 24), generator=torch.Generator().manual_seed(0))


def test_where_nothing_leaves_nothing_changes(llama, text):
    dense = copy.deepcopy(llama)
    out, _ = leave_early(llama, text, threshold=1e9)
    assert torch.equal(logits(llama, text), logits(dense, text))
    assert out.notes["adainfer"]["depth"] == 5
    assert out.notes["adainfer"]["agreement"] == 1
    for name, weight in dense.state_dict().items():
        assert torch.equal(llama.state_dict()[name], weight)


@torch.no_grad()
def plain(model, module, ids):
    """A Llama run block by block: logits (N, T, V), and how many blocks each token passed."""
    body = model.model
    x = body.embed_tokens(ids)
    angles = body.rotary_emb(x, torch.arange(ids.shape[1])[None])
    left = torch.ones(ids.shape, dtype=torch.bool)
    passed = torch.zeros(ids.shape, dtype=torch.int64)
    for i, layer in enumerate(body.layers, 1):
        y = type(layer).forward(layer, x, position_embeddings=angles, attention_mask=None)
        x = torch.where(left[..., None], y, x)
        passed += left
        p = model.lm_head(body.norm(x)).softmax(-1).sort(dim=-1, descending=True)[0]
        sure = (p[..., 0] - p[..., 1]) * module.weight[0, 0] + p[..., 0] * module.weight[0, 1]
        if i in module.tests:
            left &= ~(sure + module.bias > 0)
    return model.lm_head(body.norm(x)), passed


@pytest.mark.parametrize("options", [{}, {"start": 2, "every": 2}])
def test_tokens_leave_as_the_formula_says(llama, text, options):
    _, module = leave_early(llama, text, **options)
    module.progress.clear()
    found, (want, passed) = logits(llama, text), plain(llama, module, text)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    assert 1 < passed.double().mean() < 5
    assert set(passed.unique().tolist()) <= {*module.tests, 5}
    assert module.progress.tokens == text.numel()
    if passed.max() == 5:  # nothing was skipped
        assert int(module.progress.passes) == int(passed.sum())
    first = module.tests[0]
    assert int(module.progress.tested) >= text.numel() + int((passed > first).sum()) * (
        len(module.tests) > 1
    )


ARCHS = ["llama", "gpt2", "opt", "falcon", "gemma2", "bloom", "mixtral"]


@pytest.mark.parametrize("arch", ARCHS)
def test_a_filled_cache_gives_what_no_cache_gives(arch, text):
    model = tiny_model(arch, layers=4)
    _, module = leave_early(model, text)
    ids = text[:2, :6]
    with torch.no_grad():
        out = model(ids, use_cache=True)
        steps, cache = [out.logits[:, -1]], out.past_key_values
        for t in range(6, 14):
            out = model(text[:2, t : t + 1], past_key_values=cache, use_cache=True)
            steps.append(out.logits[:, -1])
    whole = logits(model, text[:2, :14])[:, 5:]
    torch.testing.assert_close(torch.stack(steps, 1), whole, rtol=1e-3, atol=1e-4)
    assert module.names["reader"]
    assert float(module.progress.passes) < 4 * module.progress.tokens


@pytest.mark.parametrize("agreement", [0.3, 0.5, 0.7, 0.9])
def test_in_half_precision_the_notes_say_what_the_module_does(text, agreement):
    model = tiny_model("llama", layers=5).bfloat16()
    out, module = leave_early(model, text, agreement=agreement)
    module.progress.never = True
    held = observed(model, module, text[::5], None)
    told = outcome(module(held.features) > 0, held.agrees, torch.tensor([*module.tests, 5]))
    assert {k: out.notes["adainfer"][k] for k in told} == told
    assert told["agreement"] >= agreement


@pytest.mark.parametrize("limit", [0.0, 0.1234, -0.777, 3.21])
def test_a_rounded_bias_lets_no_more_go_than_the_threshold(limit):
    module = EarlyExit("blocks", "", "head", "", 1, 1).bfloat16()
    module.bias.fill_(1.5)
    set_threshold(module, limit)
    assert 0 <= (1.5 - limit) - float(module.bias) < 0.02 * abs(1.5 - limit)


def test_blocks_behind_the_last_token_do_not_run(llama, text):
    """With a cache they run as far as their attention; without one not at all."""
    ran = []
    for layer in llama.model.layers:
        layer.self_attn.k_proj.register_forward_hook(lambda *_: ran.append("keys"))
        layer.self_attn.o_proj.register_forward_hook(lambda *_: ran.append("out"))
        layer.mlp.register_forward_hook(lambda *_: ran.append("mlp"))
    leave_early(llama, text, threshold=-1e9)  # all leave at once
    for cached in (False, True):
        ran.clear()
        with torch.no_grad():
            llama(text[:1, :4], use_cache=cached)
        assert ran == ["keys", "out", "mlp"] + ["keys"] * (4 if cached else 0)


def test_a_copy_and_a_checkpoint_do_the_same(llama, text, tmp_path):
    out, module = leave_early(llama, text)
    want = logits(llama, text)
    assert torch.equal(logits(copy.deepcopy(llama), text), want)
    checkpoint.save(llama, None, tmp_path / "out", kept=out.kept, groups=out.groups)
    again = prunekit.load(tmp_path / "out")[0]
    assert torch.equal(logits(again, text), want)
    [entry] = json.loads((tmp_path / "out/config.json").read_text())["prunekit_layout"]["modules"]
    assert entry == {"path": "model.early_exit", "kind": "early_exit", **module.numbers()}
    ids = [
        m.generate(text[:1, :5], max_new_tokens=6, do_sample=False, use_cache=cached)
        for m in (llama, again)
        for cached in (True, False)
    ]
    assert all(torch.equal(ids[0], other) for other in ids[1:])


def test_no_classifier_saves_more_than_the_oracle():
    rng = torch.Generator().manual_seed(0)
    agrees = torch.rand(200, 6, generator=rng) < torch.linspace(0.1, 0.9, 6)
    scores = agrees + 0.8 * torch.randn(200, 6, generator=rng)
    depths = torch.arange(1, 8)
    oracle = outcome(agrees, agrees, depths)
    assert oracle["agreement"] == 1
    limit = lowest_threshold(scores, agrees, 1.0)
    told = outcome(scores > limit, agrees, depths)
    assert told["agreement"] == 1
    assert oracle["depth"] < told["depth"] <= 7


@pytest.mark.parametrize("agreement", [0.5, 0.9])
def test_the_threshold_is_the_lowest_that_keeps_the_agreement(agreement):
    rng = torch.Generator().manual_seed(1)
    agrees = torch.rand(300, 4, generator=rng) < 0.5
    scores = agrees + torch.randn(300, 4, generator=rng)
    depths = torch.arange(5)
    limit = lowest_threshold(scores, agrees, agreement)
    assert outcome(scores > limit, agrees, depths)["agreement"] >= agreement
    lower = float(scores.flatten().quantile(float((scores <= limit).float().mean()) - 0.01))
    assert outcome(scores > lower, agrees, depths)["agreement"] < agreement


def test_by_hand_where_tokens_leave():
    leaves = torch.tensor([[False, True, True], [False, False, False], [True, False, False]])
    agrees = torch.tensor([[True, False, True], [False, True, False], [True, True, True]])
    told = outcome(leaves, agrees, torch.tensor([1, 3, 5, 6]))
    assert told == {"depth": pytest.approx((3 + 6 + 1) / 3), "agreement": pytest.approx(2 / 3)}


@pytest.mark.parametrize("classifier", ["svm", "logistic"])
def test_a_classifier_tells_apart_what_a_line_does(classifier):
    x = torch.rand(100, 4, 2, generator=torch.Generator().manual_seed(0))
    y = x[..., 0] + 0.5 * x[..., 1] > 0.8
    weight, bias = fitted(classifier, x, y)
    found = (x.double() @ weight.T)[..., 0] + bias > 0
    assert (found == y).double().mean() > 0.95
    with pytest.raises(ConfigError, match="all predictions of all depths are wrong"):
        fitted(classifier, x, torch.zeros_like(y))


def test_of_much_text_the_classifier_still_sees_all_depths(monkeypatch):
    """Four depths and every fourth row: of the first depth alone, which is always wrong."""
    monkeypatch.setattr("prunekit.pruners.adainfer.MOST_ROWS", 100)
    x = torch.rand(100, 4, 2, generator=torch.Generator().manual_seed(0))
    y = x[..., 0] + 0.5 * x[..., 1] > 0.8
    y[:, 0] = False
    weight, _ = fitted("logistic", x, y)
    assert float(weight[0, 0]) > 0.5


def test_what_cannot_be_is_said():
    meta = tiny_model("llama", meta=True)
    with pytest.raises(ConfigError, match="ratio=none"):
        check("adainfer", problem(meta, ratio=uniform(0.2)))
    with pytest.raises(ConfigError, match="the model has 2 blocks"):
        check("adainfer", problem(meta), start=2)
    assert check("adainfer", problem(meta)).groups == []
    one = torch.ones(1, 8, dtype=torch.int64)
    with pytest.raises(ConfigError, match="there is one sample"):
        leave_early(tiny_model("llama"), one)


def test_an_output_that_is_read_in_another_way_is_refused(text):
    projected = tiny_model("opt", word_embed_proj_dim=32)  # a matrix stands before the head
    with pytest.raises(ConfigError, match="cannot tell what a block would predict"):
        leave_early(projected, text)


def test_blocks_of_another_width_than_the_last_are_refused(llama, text):
    asked = problem(llama, text, ratio=uniform(0.2))
    sliced = pruners.build({"name": "slicegpt", "multiple": 2})(asked).model
    with pytest.raises(ConfigError, match="cannot tell what a block would predict"):
        leave_early(sliced, text)
