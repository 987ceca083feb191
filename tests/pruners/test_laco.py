"""LaCo: the merge written plainly, the authors' search, exact depths, replay, what cannot be."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from blocks import lacking
from compositions import config
from paths import authors_numbers
from problems import check, problem, uniform
from tiny_models import logits, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from prunekit import checkpoint
from prunekit.architecture.blocks import block_names
from prunekit.checkpoint.replay import replay
from prunekit.errors import ConfigError
from prunekit.graph.merging import Merge, check_mergeable, merge_blocks, merged_parameters
from prunekit.registry import pruners
from prunekit.runner.preflight import build_components
from prunekit.runner.run import run


def merge(model, tokens, share=None, exclude=None, **options):
    ratio = None if share is None else uniform(share)
    asked = problem(model, tokens, ratio=ratio, exclude=exclude)
    return pruners.build({"name": "laco", **options})(asked)


def run_merges(model, into, count, rule):
    names = list(block_names(model))
    merge_blocks(
        model, [Merge(into=names[into], blocks=names[into + 1 : into + 1 + count], rule=rule)]
    )


@pytest.fixture(scope="module")
def golden():
    return authors_numbers("laco")


@pytest.fixture
def authors(golden):
    """The model of the golden numbers."""
    state = {
        k.removeprefix("laco.model."): v for k, v in golden.items() if k.startswith("laco.model.")
    }
    vocab, hidden = state["lm_head.weight"].shape
    cfg = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=len(state["model.layers.0.mlp.up_proj.weight"]),
        num_attention_heads=2,
        num_key_value_heads=2,
        num_hidden_layers=6,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(cfg).eval()
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize(("base", "count"), [(1, 1), (1, 2), (0, 3), (4, 3)])
def test_the_authors_merge(golden, authors, base, count):
    run_merges(authors, base, count, "last")
    found = dict(authors.model.layers[base].named_modules())
    key = f"laco.merge.{base}.{count}"
    for name, module in found.items():
        if f"{key}.{name}" in golden:
            # Theirs is the sum that telescopes, so it is rounded.
            torch.testing.assert_close(module.weight, golden[f"{key}.{name}"], rtol=0, atol=1e-6)
    gone = range(base + 1, min(6, base + 1 + count))
    assert len(lacking(authors, gone).model.layers) == int(golden[f"{key}.layers"])


@pytest.mark.parametrize(("c", "i", "t"), [(3, 1, 0.6), (3, 1, 0.9), (2, 2, 0.8), (4, 1, 0.3)])
def test_the_authors_search(golden, authors, c, i, t):
    key = f"laco.search.{c}.{i}.{t}"
    tokens = golden["laco.tokens"]
    out = merge(authors, tokens, threshold=t, merge=c, interval=i, rule="last", batch=2)
    assert len(authors.model.layers) == int(golden[f"{key}.layers"])
    taken = [row for row in golden[f"{key}.log"] if row[3]]
    assert [m["into"] for m in out.notes["merges"]] == [f"model.layers.{int(r[0])}" for r in taken]
    assert out.notes["laco"]["trials"] == len(golden[f"{key}.log"])
    if taken:
        assert out.notes["laco"]["cosine"] == pytest.approx(float(taken[-1][2]), abs=1e-5)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt", "qwen2"])
def test_the_papers_formula(arch):
    model = tiny_model(arch, layers=4)
    dense = copy.deepcopy(model)
    run_merges(model, 1, 2, "differences")
    names = block_names(model)
    blocks = [dense.get_submodule(n) for n in names]
    linear = set(merged_parameters(blocks[1]))
    for name, p in model.get_submodule(names[1]).named_parameters():
        own, second, third = (b.get_parameter(name) for b in blocks[1:4])
        expected = own + (second - own) + (third - own) if name in linear else own
        torch.testing.assert_close(p, expected, rtol=0, atol=1e-6)
        assert (name in linear) == ("norm" not in name and "ln_" not in name)
    for i in (0, 2, 3):
        for p, q in zip(model.get_submodule(names[i]).parameters(), blocks[i].parameters()):
            assert torch.equal(p, q)


def test_blocks_that_are_the_same_merge_to_themselves(authors):
    for i in (2, 3):
        authors.model.layers[i].load_state_dict(authors.model.layers[1].state_dict())
    before = copy.deepcopy(authors.model.layers[1].state_dict())
    run_merges(authors, 1, 2, "differences")
    after = authors.model.layers[1].state_dict()
    assert all(torch.equal(v, before[k]) for k, v in after.items())
    run_merges(authors, 0, 1, "differences")
    for name in merged_parameters(authors.model.layers[0]):
        p, q = (authors.model.layers[i].get_parameter(name) for i in (0, 1))
        assert torch.equal(p, q), "with one block it is that block"


@pytest.mark.parametrize("options", [{"share": 0.0}, {"threshold": 1.0}])
def test_nothing_to_merge_changes_nothing(tokens, options):
    model = tiny_model("llama", layers=6)
    before = copy.deepcopy(model.state_dict())
    out = merge(model, tokens, **options)
    assert out.notes["merges"] == []
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("gone", [1, 2, 3, 4])
def test_the_ratio_says_how_many_blocks_go(tokens, arch, gone):
    model = tiny_model(arch, layers=8)
    dense = copy.deepcopy(model)
    out = merge(model, tokens, share=gone / 8, merge=3)
    assert len(block_names(model)) == 8 - gone == int(out.kept["blocks"].sum())
    assert out.notes["counts"] == {"blocks": gone}
    merge_blocks(dense, out.notes["merges"])
    lost = {n for m in out.notes["merges"] for n in m["blocks"]}
    kept = [n for n in block_names(dense) if n not in lost]
    for name, new in zip(kept, block_names(model), strict=True):
        pairs = zip(dense.get_submodule(name).parameters(), model.get_submodule(new).parameters())
        assert all(torch.equal(p, q) for p, q in pairs)
    steps = model.generate(tokens[:1], max_new_tokens=4, do_sample=False, use_cache=True)
    again = model.generate(tokens[:1], max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(steps, again)


def test_the_threshold_that_a_ratio_finds_gives_the_same_model(tokens):
    one = tiny_model("llama", layers=8)
    two = copy.deepcopy(one)
    found = merge(one, tokens, share=3 / 8, merge=2).notes
    told = merge(two, tokens, threshold=found["laco"]["threshold"], merge=2).notes
    assert found["merges"] == told["merges"][: len(found["merges"])]
    stricter = found["laco"]["threshold"] + 2 / 2**12
    other = merge(tiny_model("llama", layers=8), tokens, threshold=min(1.0, stricter), merge=2)
    assert other.notes["counts"]["blocks"] < 3


def test_excluded_blocks_neither_go_nor_change(tokens):
    model = tiny_model("llama", layers=8)
    dense = copy.deepcopy(model)
    out = merge(model, tokens, share=0.5, merge=2, exclude={"name": "ends", "first": 2, "last": 1})
    touched = {n for m in out.notes["merges"] for n in (m["into"], *m["blocks"])}
    assert touched
    assert not touched & {"model.layers.0", "model.layers.1", "model.layers.7"}
    for old, new in ((0, 0), (1, 1), (7, len(model.model.layers) - 1)):
        pair = (dense.model.layers[old], model.model.layers[new])
        assert all(torch.equal(p, q) for p, q in zip(*(b.parameters() for b in pair)))


def test_trials_leave_no_trace(tokens, monkeypatch):
    """Until the merges are made, the model is the dense one after every trial."""
    from prunekit.pruners import laco

    model = tiny_model("llama", layers=6)
    before = copy.deepcopy(model.state_dict())
    seen = []

    def looked(of, merges):
        seen.append(all(torch.equal(v, before[k]) for k, v in of.state_dict().items()))
        assert not any(m._forward_hooks for m in of.modules())

    monkeypatch.setattr(laco, "merge_blocks", looked)
    merge(model, tokens, share=0.5, merge=2)
    assert seen == [True]


@pytest.mark.parametrize(
    ("share", "options", "says"),
    [
        (None, {}, "neither was given"),
        (0.2, {"threshold": 0.5}, "both was given"),
        (0.2, {"merge": 8}, "pruner.merge=8: 6 blocks"),
        (0.5, {"merge": 2, "interval": 4}, "3 blocks should go, and 1 can"),
    ],
)
def test_what_cannot_be_is_said_from_shapes_alone(share, options, says):
    asked = problem(
        tiny_model("llama", layers=6, meta=True), ratio=None if share is None else uniform(share)
    )
    with pytest.raises(ConfigError, match=says):
        check("laco", asked, **options)


def test_blocks_with_one_spared_between_them_are_refused():
    def spare(groups):
        [g] = [g for g in groups if g.modules]
        left = tuple(m for m in g.modules if not m.endswith(".2"))
        return [dataclasses.replace(g, units=len(left), modules=left, shape=(len(left),))]

    asked = problem(tiny_model("llama", layers=6, meta=True), ratio=uniform(0.5), exclude=spare)
    with pytest.raises(ConfigError, match="pruner=laco merges within one unbroken run of blocks"):
        check("laco", asked, merge=2)


def test_blocks_of_another_build_are_refused():
    model = tiny_model("llama", layers=3)
    model.model.layers[2].mlp = tiny_model("llama", ffn=48).model.layers[0].mlp
    with pytest.raises(ConfigError, match="layers.2 is not built like"):
        check_mergeable(model, block_names(model))
    model.model.layers[2] = model.model.layers[1]
    with pytest.raises(ConfigError, match="share parameters"):
        check_mergeable(model, block_names(model))


def test_a_criterion_is_refused():
    with pytest.raises(ConfigError, match="pruner=laco chooses by itself"):
        build_components(config("pruner=laco"))


def test_the_checkpoint_is_a_stock_one_and_replay_makes_it_again(tmp_path, tokens):
    cfg = config("criterion=none", "pruner=laco", "pruner.merge=2", "ratio.of=units")
    cfg["model"] |= {"layers": 6} if "layers" in cfg["model"] else {}
    cfg["ratio"]["target"] = 0.34
    record = run(cfg, tmp_path)
    manifest = json.loads((tmp_path / "checkpoint" / "pruning.json").read_text())
    assert manifest["merges"] == record["notes"]["merges"] != []
    assert manifest["loads_with"] == "from_pretrained(path)"
    model, _ = checkpoint.load(tmp_path / "checkpoint")
    from prunekit.registry import models

    dense, _ = models.build(cfg["model"])()
    again = replay(dense, tmp_path / "checkpoint")
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    with pytest.raises(ConfigError, match="merges must be a list of into, blocks and rule"):
        replay(models.build(cfg["model"])()[0], manifest | {"merges": [{"into": 3}]})
