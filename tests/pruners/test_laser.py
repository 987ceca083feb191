"""LASER on tiny models: ranks, the search written plainly, and both ways of storing a matrix."""

from __future__ import annotations

import copy

import pytest
import torch
from compositions import config
from paths import authors_numbers
from problems import check, problem
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from prunekit import checkpoint
from prunekit.architecture.linear import weight_of
from prunekit.architecture.matrices import matrices, matrix, module_name
from prunekit.checkpoint.remote_code.runtime_modules import LowRank
from prunekit.errors import ConfigError
from prunekit.registry import pruners
from prunekit.runner.preflight import build_components
from prunekit.runner.run import run
from prunekit.solvers.low_rank import rank_of

ARCHS = ["llama", "gpt2", "opt", "qwen2_moe"]
SHARES = [0.05, 0.3, 0.6]
TEXT = torch.randint(8, 100, (6, 24), generator=torch.Generator().manual_seed(0))


def reduce(model, **options):
    options = {"shares": SHARES, "batch": 4} | options
    asked = problem(model, TEXT)
    check("laser", asked, **options)
    return pruners.build({"name": "laser", **options})(asked)


@torch.no_grad()
def loss_of(model):
    return float(model(TEXT, labels=TEXT).loss)


@torch.no_grad()
def logits(model):
    return model(TEXT, use_cache=False).logits


def truncated(W, share):
    """The nearest matrix of that share of the rank."""
    U, S, V = torch.linalg.svd(W.double(), full_matrices=False)
    rank = max(1, int(share * len(S) + 1e-9))
    return ((U[:, :rank] * S[:rank]) @ V[:rank]).float()


def product(module):
    """(outputs, inputs) that a module computes with, factors or not."""
    if isinstance(module, LowRank):
        return module.left.weight @ module.right.weight
    return weight_of(module)


@pytest.mark.parametrize("factors", [True, False])
@pytest.mark.parametrize("arch", ARCHS)
def test_chosen_matrices_become_their_truncation_and_the_others_stay(arch, factors):
    model = tiny_model(arch)
    dense = copy.deepcopy(model)
    targets = {"gpt2": ["c_fc"], "opt": ["fc1"]}.get(arch, ["up_proj"])
    out = reduce(model, search="none", targets=targets, layers=[1], shares=[0.25], factors=factors)
    told = {r["matrix"]: r for r in out.notes["laser"]["reduced"]}
    assert len(told) == 1
    for g in matrices(dense):
        W, module = matrix(dense, g).detach(), model.get_submodule(module_name(g))
        if g.name not in told:
            assert torch.equal(product(module), W)
            continue
        found = product(module).detach()
        torch.testing.assert_close(found, truncated(W, 0.25), rtol=0, atol=1e-5)
        rank = rank_of(W.shape, 0.25)
        assert torch.linalg.matrix_rank(found.double(), atol=1e-4) == rank
        assert told[g.name]["rank"] == rank
        smaller = factors and rank * sum(W.shape) < W.numel()
        assert isinstance(module, LowRank) == told[g.name]["as_factors"] == smaller
        left_out = torch.linalg.svdvals(W)[rank:].square().sum().sqrt()
        torch.testing.assert_close((W - found).norm(), left_out, rtol=1e-4, atol=1e-5)
    gone = sum(p.numel() for p in dense.parameters()) - sum(p.numel() for p in model.parameters())
    assert out.notes["laser"]["parameters_removed"] == gone
    assert (gone > 0) == factors


@pytest.mark.parametrize("kind", ["decay", "flat"])
def test_the_authors_matrices_end_at_their_exact_truncation(kind):
    golden = authors_numbers("laser")
    W = golden[f"W_{kind}"]
    model = tiny_model("llama", hidden=W.shape[1], ffn=W.shape[0])
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.copy_(W)
    for rate in ("9.5", "9", "8", "6", "4", "2"):
        one = copy.deepcopy(model)
        shares = [1 - float(rate) / 10]
        reduce(one, search="none", targets=["up_proj"], layers=[0], shares=shares)
        found = product(one.model.layers[0].mlp.up_proj)
        expected = golden[f"exact_{kind}_{rate}"]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(W.abs().max()))


def test_where_factors_are_no_smaller_the_matrix_stays_dense():
    model = tiny_model("llama")
    out = reduce(model, search="none", targets=["mlp.*", "q_proj"], shares=[0.6])
    for r in out.notes["laser"]["reduced"]:
        outputs, inputs = {"q_proj": (80, 64), "down_proj": (64, 96)}.get(
            r["matrix"].rpartition(".")[2], (96, 64)
        )
        assert r["as_factors"] == (r["rank"] * (outputs + inputs) < outputs * inputs)
    assert {r["as_factors"] for r in out.notes["laser"]["reduced"]} == {True, False}


@pytest.mark.parametrize("arch", ARCHS)
def test_best_is_the_best_of_all_single_reductions(arch):
    model, dense = tiny_model(arch), tiny_model(arch)
    out = reduce(model, search="best")
    plain = {}
    for g in matrices(dense):
        W = matrix(dense, g)
        before = W.detach().clone()
        for share in SHARES if len(W) > 1 else ():  # a gate of one row has no lower rank
            with torch.no_grad():
                W.copy_(truncated(before, share))
                plain[g.name, share] = loss_of(dense)
                W.copy_(before)
    costs = out.notes["laser"]["costs"]
    assert {(n, float(s)): c for n, row in costs.items() for s, c in row.items()} == pytest.approx(
        plain, rel=1e-4
    )
    (taken,) = out.notes["laser"]["reduced"]
    name, share = min(plain, key=plain.get)
    assert (taken["matrix"], taken["share"]) == (name, share)
    assert (
        plain[name, share]
        < loss_of(tiny_model(arch))
        == pytest.approx(out.notes["laser"]["dense"], rel=1e-5)
    )
    assert loss_of(model) == pytest.approx(plain[name, share], rel=1e-4)
    assert out.notes["laser"]["reduced_to"] == pytest.approx(plain[name, share], rel=1e-4)


@pytest.mark.parametrize("arch", ARCHS)
def test_greedy_goes_from_the_last_block_to_the_first_and_takes_the_lowest_share(arch):
    model, plain = tiny_model(arch), tiny_model(arch)
    out = reduce(model, search="greedy")
    standing, taken = loss_of(plain), []
    for layer in (1, 0):
        for g in (g for g in matrices(plain) if g.layer == layer):
            W = matrix(plain, g)
            before = W.detach().clone()
            for share in SHARES:
                with torch.no_grad():
                    W.copy_(truncated(before, share))
                if (loss := loss_of(plain)) < standing:
                    standing = loss
                    taken.append((g.name, share))
                    break
            else:
                with torch.no_grad():
                    W.copy_(before)
    assert [(r["matrix"], r["share"]) for r in out.notes["laser"]["reduced"]] == taken
    assert len(taken) > 2
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-3, atol=1e-3)
    assert loss_of(model) == pytest.approx(standing, rel=1e-4)
    assert standing < out.notes["laser"]["dense"]


def test_the_metric_may_be_how_often_the_next_token_ranks_first():
    model = tiny_model("llama")
    out = reduce(model, metric="accuracy")
    right = (logits(model)[:, :-1].argmax(-1) == TEXT[:, 1:]).float().mean()
    assert out.notes["laser"]["reduced_to"] == pytest.approx(1 - float(right), abs=1e-6)
    assert out.notes["laser"]["reduced_to"] < out.notes["laser"]["dense"]


def test_search_reads_the_calibration_text_alone():
    """Another text decides otherwise."""
    other = TEXT.flip(1)
    first, second = tiny_model("llama"), tiny_model("llama")
    told = reduce(first).notes["laser"]
    again = pruners.build({"name": "laser", "shares": SHARES})(problem(second, other))
    assert told["costs"] != again.notes["laser"]["costs"]


def test_a_model_that_every_reduction_harms_stays_as_it_is(caplog):
    """It has learned the text by heart."""
    model = tiny_model("llama")
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        model(TEXT, labels=TEXT).loss.backward()
        optimizer.step()
    before = copy.deepcopy(model.state_dict())
    out = reduce(model, shares=[0.05], search="best")
    assert out.notes["laser"]["reduced"] == []
    assert "none is made" in caplog.text
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_share_of_one_changes_nothing():
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    out = reduce(model, search="none", shares=[1.0])
    assert out.notes["laser"]["reduced"] == []
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("factors", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_it_loads_again_both_ways(arch, dtype, factors, tmp_path):
    """GPT-2's initialisation reads the weight of c_proj by name."""
    model = tiny_model(arch)
    for p in model.parameters():  # buffers stay in float32, as transformers loads them
        p.data = p.data.to(dtype)
    out = reduce(model, search="none", shares=[0.3], factors=factors)
    assert {r["as_factors"] for r in out.notes["laser"]["reduced"]} == {factors}
    checkpoint.save(model, None, tmp_path / "out", kept=out.kept, groups=out.groups)
    ours = checkpoint.load(tmp_path / "out")[0]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=factors)
    for again in (ours, theirs.eval()):
        assert torch.equal(logits(again), logits(model))


REFUSED = [
    ({"targets": ["wheels"]}, "there are: .*up_proj"),
    ({"layers": [1, 2]}, "the model has the blocks 0 to 1"),
    ({"layers": []}, "the model has the blocks 0 to 1"),
    ({"shares": []}, "there must be one"),
    ({"search": "none"}, "search=none takes one share"),
]


@pytest.mark.parametrize(("options", "says"), REFUSED)
def test_what_cannot_be_is_said_before_a_weight_is_read(options, says):
    with pytest.raises(ConfigError, match=says):
        check("laser", problem(tiny_model("llama", meta=True)), **{"shares": SHARES} | options)


@pytest.mark.parametrize("share", [0, 1.5, -0.1])
def test_shares_lie_above_zero_and_up_to_one(share):
    with pytest.raises(ConfigError, match="shares"):
        pruners.build({"name": "laser", "shares": [share]})


def test_a_matrix_in_two_places_is_refused():
    model = tiny_model("llama")
    first, second = (block.mlp for block in model.model.layers)
    second.up_proj.weight = first.up_proj.weight
    with pytest.raises(ConfigError, match="layers.0.mlp.up_proj shares its matrix"):
        check("laser", problem(model), shares=SHARES)
    check("laser", problem(model), shares=SHARES, targets=["down_proj"])


def test_a_model_may_read_a_weight_by_name():
    found = {}
    for by_name in (True, False):
        model = tiny_model("llama")
        mlp = model.model.layers[0].mlp

        def forward(x, mlp=mlp, by_name=by_name):
            return mlp.down_proj(x @ mlp.up_proj.weight.T if by_name else mlp.up_proj(x))

        mlp.forward = forward
        reduce(model, search="none", shares=[0.3])
        found[by_name] = logits(model)
    torch.testing.assert_close(found[True], found[False], rtol=1e-4, atol=1e-4)


def test_a_linear_module_that_does_more_is_refused():
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj.__class__ = Doubled
    with pytest.raises(ConfigError, match=r"does not compute with factors"):
        reduce(model, search="none", shares=[0.3])
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj.__class__ = Doubled
    reduce(model, search="none", shares=[0.3], factors=False)


WORDS = ["criterion=none", "pruner=laser"]


def test_it_runs_from_the_command_line(tmp_path):
    cfg = config(*WORDS, "pruner.targets=[mlp.*]") | {"ratio": {"name": "none"}}
    record = run(cfg, tmp_path)
    told = record["notes"]["laser"]
    assert told["reduced"]
    assert all(".mlp." in r["matrix"] for r in told["reduced"])
    gone = record["results"]["dense/params"] - record["results"]["pruned/params"]
    assert gone == told["parameters_removed"]
    model, _ = checkpoint.load(tmp_path / "checkpoint")
    assert sum(p.numel() for p in model.parameters()) == record["results"]["pruned/params"]


def test_an_eval_of_the_text_that_decides_is_refused(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("some text. " * 200)
    node = {"name": "perplexity", "window": 16}
    cfg = config(*WORDS) | {"ratio": {"name": "none"}}
    cfg |= {"calib": {"name": "text", "path": str(text), "samples": 2, "length": 16}}
    build_components(cfg | {"eval": {"a": node}})
    with pytest.raises(ConfigError, match="eval a reads the same one .*text.txt"):
        build_components(cfg | {"eval": {"a": node | {"path": str(text)}}})
    cfg["calib"] = {"name": "crop", "dataset": "pydocs", "split": "train"}
    with pytest.raises(ConfigError, match=r"eval a reads the same one \(pydocs, train\)"):
        build_components(cfg | {"eval": {"a": node | {"split": "train"}}})


def test_a_ratio_is_refused_before_anything_is_loaded():
    with pytest.raises(ConfigError, match="pruner=laser decides by itself.*ratio=uniform"):
        build_components(config(*WORDS))
