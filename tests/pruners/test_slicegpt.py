"""SliceGPT against the projected network in the model's own basis, computed plainly."""

from __future__ import annotations

import copy

import pytest
import torch
from problems import problem, uniform
from reference import tiny_llama
from tiny_models import logits, tiny_model

from prunekit import checkpoint
from prunekit.architecture.residual import stream
from prunekit.errors import ConfigError
from prunekit.pruners.slicegpt import slicegpt
from prunekit.solvers.rotation import removed
from prunekit.types import Allocation

C, L = 24, 4


def build(**over):
    model = tiny_llama(num_hidden_layers=L, **over)
    with torch.no_grad():
        for block in model.model.layers:  # sub-layers add something comparable to what is there
            block.self_attn.o_proj.weight.mul_(2)
    return model.double()


def cut(model, tokens, gone, **options):
    def ratio(_problem, _groups):
        return Allocation({"hidden": gone}, budget="units")

    return slicegpt(problem(model, tokens, ratio=ratio), **{"multiple": 2, **options})


def projected(model, tokens, width, last, weighting="signal"):
    """Logits of the dense model whose stream is projected before every sub-layer and after the last
    one; with `last` whole up to the last block's entrance, with output up to the last sub-layer.
    """
    blocks = len(model.model.layers) - (last != "sliced")

    def project(x):
        z = x.flatten(0, 1)
        z = z / z.norm(dim=1, keepdim=True) if weighting == "direction" else z
        Q = torch.linalg.eigh(z.T @ z).eigenvectors[:, -width:]
        return x @ Q @ Q.T

    net = model.model
    x = net.embed_tokens(tokens)
    positions = net.rotary_emb(x, torch.arange(tokens.shape[1])[None])
    mask = torch.full((tokens.shape[1],) * 2, -torch.inf, dtype=x.dtype).triu(1)[None, None]
    for i, block in enumerate(net.layers):
        if i <= blocks:
            x = project(x)
        x = (
            x
            + block.self_attn(
                block.input_layernorm(x), position_embeddings=positions, attention_mask=mask
            )[0]
        )
        if i < blocks or last == "output":
            x = project(x)
        x = x + block.mlp(block.post_attention_layernorm(x))
    if blocks == len(net.layers):
        x = project(x)
    return model.lm_head(net.norm(x))


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("last", ["whole", "output", "sliced"])
@pytest.mark.parametrize("bias", [False, True])
def test_ratio_zero_changes_nothing(tokens, tie, last, bias):
    model = build(tie_word_embeddings=tie, attention_bias=bias, mlp_bias=bias)
    before = copy.deepcopy(model.state_dict())
    after = cut(model, tokens, 0, last=last, multiple=8).model.state_dict()  # 24 are no 25
    assert before.keys() == after.keys()
    assert all(torch.equal(v, after[k]) for k, v in before.items())


def test_a_width_that_there_is_not_is_refused(tokens):
    with pytest.raises(ConfigError, match=r"multiple=128: the residual stream has \d+"):
        cut(build(), tokens, 7, multiple=128)


@pytest.mark.parametrize("weighting", ["signal", "direction"])
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("last", ["whole", "output", "sliced"])
def test_sliced_is_the_projected_network(tokens, tie, last, weighting):
    model = build(tie_word_embeddings=tie)
    dense = copy.deepcopy(model)
    pruned = cut(model, tokens, 7, last=last, weighting=weighting)
    with torch.no_grad():
        want = projected(
            dense, tokens, C - 8, last, weighting
        )  # 17 channels to keep, a multiple of two: 16
    assert pruned.notes["slicegpt"]["width"] == 16
    torch.testing.assert_close(logits(pruned.model, tokens), want, rtol=1e-5, atol=1e-5)
    assert (logits(dense, tokens) - want).abs().max() > 1e-2


def test_the_first_basis_loses_the_smallest_eigenvalues(tokens):
    """The error of the sliced signal at the first norm is the sum of the dropped
    eigenvalues.
    """
    model = build(tie_word_embeddings=True)
    x = model.model.embed_tokens(tokens).detach().flatten(0, 1)
    cut(model, tokens, 8)
    Q = model.model.layers[0].rotation.weight.detach()
    error = (x - x @ Q @ Q.T).square().sum()
    torch.testing.assert_close(
        error, torch.linalg.eigvalsh(x.T @ x)[:8].sum(), rtol=1e-5, atol=1e-8
    )


@pytest.mark.parametrize("last", ["sliced", "output"])
@pytest.mark.parametrize("tie", [False, True])
def test_the_parameters_that_go_are_counted_beforehand(tokens, tie, last):
    model = build(tie_word_embeddings=tie, attention_bias=True, mlp_bias=True)
    asked = problem(model, tokens)
    chain = stream(model, *asked.groups(["hidden"]), asked.blocks())
    expected = removed(model, chain, L, 16, last == "output")
    pruned = cut(model, tokens, 8, last=last)
    assert pruned.notes["slicegpt"]["parameters_removed"] == expected


@pytest.mark.parametrize("tie", [False, True])
def test_the_budget_is_met_with_the_added_matrices(tokens, tie):
    model = build(tie_word_embeddings=tie, intermediate_size=200)
    before = sum(p.numel() for p in model.parameters())
    pruned = slicegpt(problem(model, tokens, ratio=uniform(0.2, "model")), multiple=1)
    after = sum(p.numel() for p in pruned.model.parameters())
    assert abs((before - after) / before - 0.2) < 0.03  # one channel is 1/24
    assert pruned.notes["slicegpt"]["parameters_removed"] == before - after


@pytest.mark.parametrize("last", ["whole", "output"])
def test_tied_embeddings_stay_tied_and_the_checkpoint_gives_the_same_logits(tokens, tmp_path, last):
    model = build(tie_word_embeddings=True).float()
    pruned = cut(model, tokens, 8, last=last)
    assert pruned.model.lm_head.weight is pruned.model.model.embed_tokens.weight
    folder = checkpoint.save(
        pruned.model, None, tmp_path / "sliced", kept=pruned.kept, groups=pruned.groups
    )
    again, _ = checkpoint.load(folder)
    assert torch.equal(logits(again, tokens), logits(pruned.model, tokens))
    one = again.generate(tokens[:1], max_new_tokens=5, do_sample=False, use_cache=True)
    two = again.generate(tokens[:1], max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(one, two)


@pytest.mark.parametrize("last", ["sliced", "output"])
def test_the_checkpoint_loads_without_prunekit(tokens, tmp_path, last):
    from transformers import AutoModelForCausalLM

    pruned = cut(build(tie_word_embeddings=False).float(), tokens, 8, last=last)
    folder = checkpoint.save(
        pruned.model, None, tmp_path / "sliced", kept=pruned.kept, groups=pruned.groups
    )
    again = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert torch.equal(logits(again, tokens), logits(pruned.model, tokens))


def test_a_copy_rotates_by_itself(tokens):
    pruned = cut(build(), tokens, 8)
    twin = copy.deepcopy(pruned.model)
    want = logits(pruned.model, tokens)
    with torch.no_grad():
        for m in pruned.model.modules():
            if type(m).__name__ == "Rotation":
                m.weight.zero_()
    torch.testing.assert_close(logits(twin, tokens), want)


def test_layer_norms_are_refused(tokens):
    from transformers import OPTConfig, OPTForCausalLM

    sizes = dict(
        vocab_size=101,
        hidden_size=24,
        ffn_dim=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        word_embed_proj_dim=24,
    )
    model = OPTForCausalLM(OPTConfig(**sizes))
    with pytest.raises(ConfigError):
        cut(model.eval(), tokens, 8)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gemma", "phi3", "granite", "smollm3"])
def test_architectures_of_the_llama_form(name, tokens):
    """Biases, query norms, gains of 1 + w, fused matrices, scaled sums: nothing of it is told to
    the pruner.
    """
    model = tiny_model(name)
    want = logits(model, tokens)
    width = model.config.hidden_size
    torch.testing.assert_close(
        logits(cut(copy.deepcopy(model), tokens, 0).model, tokens), want, rtol=0, atol=1e-3
    )
    less = cut(copy.deepcopy(model), tokens, width // 4).model
    assert sum(p.numel() for p in less.model.layers[0].parameters()) < sum(
        p.numel() for p in model.model.layers[0].parameters()
    )
    assert (logits(less, tokens) - want).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "words"),
    [("gemma2", "no chain"), ("gpt_neox", "RMSNorm"), ("cohere", "no chain"), ("mpt", "RMSNorm")],
)
def test_other_forms_are_refused(name, words, tokens):
    with pytest.raises(ConfigError, match=words):
        cut(tiny_model(name), tokens, 8)
