"""Matrices that several modules use: what all of them read counts, in a run over one block too."""

from __future__ import annotations

import copy

import pytest
import torch
from problems import problem, uniform
from tiny_models import tiny_model
from torch import nn

from prunekit.activations.gram import grams
from prunekit.activations.hooks import hook_activations
from prunekit.activations.moments import moments
from prunekit.activations.sharing import places_of, watched
from prunekit.activations.storage import PassOptions
from prunekit.architecture.matrices import matrices, matrix, module_name
from prunekit.architecture.streaming import stream
from prunekit.registry import pruners
from prunekit.scoring.wanda import input_norms
from prunekit.selection.elements import per_row

DOWN = "mlp.down_proj"


def sharing(how):
    """Blocks 0 and 1 of three share down_proj, or their whole feed-forward module."""
    model = tiny_model("llama", layers=3)
    first, second, _ = model.model.layers
    if how == "matrix":
        second.mlp.down_proj.weight = first.mlp.down_proj.weight
    else:
        second.mlp = first.mlp
    return model


def read_by_down(model, tokens):
    """(tokens, inputs) of every call of a down_proj that uses block 0's matrix."""
    down, seen = model.model.layers[0].mlp.down_proj, []
    users = {
        n: seen.append for n, m in model.named_modules() if getattr(m, "weight", 0) is down.weight
    }
    with hook_activations(model, inputs=users), torch.no_grad():
        model(tokens)
    assert len(seen) == 2
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in seen])


def runs(model, tokens):
    """Over the model, and over block 0 on its own."""
    asked = problem(model, tokens)
    yield asked.run()
    groups = matrices(model)
    counts = {g.name: 1 for g in groups}
    yield next(asked.by_block(groups, counts, PassOptions()))[1]


@pytest.mark.parametrize("how", ["matrix", "module"])
def test_all_that_is_read_counts_whatever_the_run_is_over(how, tokens):
    model = sharing(how)
    [down] = [g for g in matrices(model, [DOWN]) if g.layer == 0]
    X = read_by_down(model, tokens)
    name = module_name(down)
    for run in runs(model, tokens):
        found = moments(model, [name], run)[name]
        assert found.count == len(X)
        torch.testing.assert_close(found.mean, X.mean(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.variance, X.var(0, unbiased=False), rtol=1e-4, atol=1e-6)
        norms = input_norms(model, [down], run)[down.name]
        torch.testing.assert_close(norms, X.norm(dim=0), rtol=1e-4, atol=1e-5)
        [(_, gram)] = grams(model, [down], run)
        torch.testing.assert_close(gram, X.T @ X / len(X), rtol=1e-4, atol=1e-5)


def test_a_module_of_two_names_is_watched_once():
    model = sharing("module")
    places = places_of(model, [f"model.layers.{i}.{DOWN}" for i in (0, 2)])
    first, last = places.values()
    assert list(first) == [f"model.layers.{i}.{DOWN}" for i in (0, 1)]
    assert watched(model, first) == [f"model.layers.0.{DOWN}"]
    assert list(last) == watched(model, last) == [f"model.layers.2.{DOWN}"]


def test_modules_that_read_the_same_share_a_gram_only_where_all_of_them_do(tokens):
    """Block 1 has q_proj of block 0, and a k_proj of its own."""
    model = tiny_model("llama")
    first, second = model.model.layers
    second.self_attn.q_proj.weight = first.self_attn.q_proj.weight
    second.self_attn.v_proj.weight = first.self_attn.v_proj.weight
    groups = [g for g in matrices(model, ["q_proj", "k_proj", "v_proj"]) if g.layer == 0]
    rows = [
        [g.name.split(".")[-1] for g in row]
        for row, _ in grams(model, groups, problem(model, tokens).run())
    ]
    assert rows == [["q_proj", "v_proj"], ["k_proj"]]


class Block(nn.Module):
    """Reads with one of a list of matrices, the others standing idle in it."""

    def __init__(self, adapters, number):
        super().__init__()
        self.adapters, self.number = adapters, number

    def forward(self, x):
        return x + torch.tanh(self.adapters[self.number](x))


class Adapted(nn.Module):
    """Blocks that share a list of adapters, of which each uses its own, as Zamba2's do."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(128, 24)
        adapters = nn.ModuleList(nn.Linear(24, 24, bias=False) for _ in range(2))
        self.blocks = nn.ModuleList(Block(adapters, n) for n in range(2))

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, use_cache=False):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("name", ["unstructured", "sparsegpt", "admm"])
def test_a_matrix_that_stands_idle_in_its_first_block_is_pruned_by_what_a_later_one_reads(
    name, tokens
):
    torch.manual_seed(0)
    model = Adapted().eval()
    dense = copy.deepcopy(model)
    node = {"name": "wanda"} if name == "unstructured" else None
    asked = problem(model, tokens, criterion=node, ratio=uniform(0.5))
    out = pruners.build({"name": name})(asked)
    assert [g.name for g in out.groups] == ["weights.0.adapters.0", "weights.0.adapters.1"]
    with torch.no_grad():
        x = dense.embed(tokens)
        x = x + torch.tanh(x @ dense.blocks[0].adapters[0].weight.T)
        first = x.flatten(0, 1).norm(dim=0)
    W = dense.blocks[0].adapters[1].weight.detach()
    by_place = torch.arange(24).expand(24, 24) >= 12
    kept = out.kept["weights.0.adapters.1"]
    assert (kept == by_place).float().mean() < 0.7
    if name == "unstructured":
        assert (kept == per_row(W.abs() * first, 288)).float().mean() > 0.99


def test_sparsellm_improves_a_shared_block_for_all_that_read_it(tokens):
    """Its error is that of both calls."""
    model = sharing("module")
    dense = copy.deepcopy(model)
    asked = problem(model, tokens, ratio=uniform(0.5))
    out = pruners.build({"name": "sparsellm", "block": 32, "targets": ["mlp.*"]})(asked)
    seen = []
    with hook_activations(dense, {"model.layers.0.mlp": seen.append}), torch.no_grad():
        dense(tokens)
        x = torch.cat(seen)
        gap = model.model.layers[0].mlp(x) - dense.model.layers[0].mlp(x)
    errors = out.notes["feed_forward_errors"]["neurons.0"]
    assert min(errors) == pytest.approx(float(gap.square().mean()), rel=1e-3)


@pytest.mark.parametrize("streamed", [False, True])
def test_wanda_by_blocks_takes_what_matters_least_to_all_blocks(streamed, tokens):
    model = sharing("matrix")
    dense = copy.deepcopy(model)
    if streamed:
        stream(model, "cpu")
    asked = problem(model, tokens, criterion={"name": "wanda"}, ratio=uniform(0.5))
    out = pruners.build({"name": "unstructured", "targets": [DOWN]})(asked)
    [g] = [g for g in out.groups if g.layer == 0]
    W = matrix(dense, g).detach()
    expected = per_row(W.abs() * read_by_down(dense, tokens).norm(dim=0), W.numel() // 2)
    assert (out.kept[g.name] == expected).float().mean() > 0.999
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, matrix(model, g))
