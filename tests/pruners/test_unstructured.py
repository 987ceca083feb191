"""Single weights: which elements go, brute force against the rules of the papers, and the same
through the product's own runs.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from compositions import config
from hypothesis import given, settings
from hypothesis import strategies as st

from prunekit.activations.moments import watch
from prunekit.activations.runs import WholeRun
from prunekit.architecture.matrices import block_names, matrices, matrix, module_name
from prunekit.checkpoint import load
from prunekit.errors import ConfigError
from prunekit.ratios.owl import shares
from prunekit.registry import criteria, pruners, ratios
from prunekit.runner.run import run
from prunekit.selection import elements as patterns


@pytest.fixture
def llama(tiny_archs):
    return tiny_archs.tiny_model("llama", layers=3).eval()


def prune(
    model,
    tokens,
    target=0.5,
    criterion="wanda",
    ratio=None,
    exclude=lambda groups: groups,
    **options,
):
    ratio = ratios.build(ratio or {"name": "uniform", "target": target, "of": "units"})
    return pruners.build({"name": "weights", **options})(
        model, tokens, criteria.build({"name": criterion}), ratio, exclude
    )


def drawn(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def inputs_of(model, tokens):
    """Group name -> all inputs of its module, as one matrix (tokens, inputs)."""
    seen = {}
    with (
        watch(
            model,
            {
                module_name(g): lambda x, n=g.name: seen.setdefault(n, []).append(x)
                for g in matrices(model)
            },
        ),
        torch.no_grad(),
    ):
        model(tokens)
    return {n: torch.cat([x.reshape(-1, x.shape[-1]) for x in xs]) for n, xs in seen.items()}


# ---- selection


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5), st.integers(1, 9), st.data())
def test_lowest_is_a_stable_sort(rows, columns, data):
    n = data.draw(st.integers(0, columns))
    scores = (
        torch.tensor(
            data.draw(st.lists(st.integers(0, 3), min_size=rows * columns, max_size=rows * columns))
        )
        .view(rows, columns)
        .float()
    )
    expected = torch.ones(rows, columns, dtype=torch.bool)
    for i, row in enumerate(scores.tolist()):
        expected[i, sorted(range(columns), key=lambda j: row[j])[:n]] = False
    assert torch.equal(patterns.lowest(scores, n), expected)


@pytest.mark.parametrize(
    ("part", "units"), [(0.29, 100), (0.1, 30), (0.5, 7), (0.7, 884_736), (0.0, 5)]
)
def test_shares_are_floored(part, units):
    assert patterns.share(units, part) == math.floor(round(part * units, 6))


@pytest.mark.parametrize("scope", [*patterns.SCOPES, "model"])
def test_counts_are_exact_and_what_goes_is_lowest_and_nested(scope):
    scores = drawn(12, 40)
    masks = []
    for part in (0.3, 0.6):
        count = patterns.share(480, part)
        mask = (
            patterns.everywhere({"a": scores}, count)["a"]
            if scope == "model"
            else patterns.SCOPES[scope](scores, count)
        )
        assert int((~mask).sum()) == count
        masks.append(mask)
        for s, m in (
            [(scores, mask)] if scope in ("matrix", "model") else zip(scores, mask, strict=True)
        ):
            if not m.all():
                assert s[m].min() >= s[~m].max()
    assert not (masks[1] & ~masks[0]).any()


def test_all_matrices_compete_in_the_model_scope():
    scores = {"a": drawn(4, 8), "b": drawn(3, 5, seed=1) + 2, "c": drawn(2, 2, seed=2)}
    kept = patterns.everywhere(scores, 34)
    assert sum(int((~m).sum()) for m in kept.values()) == 34
    flat = torch.cat([s.flatten() for s in scores.values()])
    assert torch.equal(
        torch.cat([m.flatten() for m in kept.values()]), flat > flat.sort().values[33]
    )


@pytest.mark.parametrize(("keep", "length"), [(2, 4), (4, 8), (1, 4)])
def test_every_run_of_inputs_has_its_zeros(keep, length):
    scores = drawn(6, 32)
    mask = patterns.Pattern(keep, length).mask(scores, keep)
    assert (mask.view(6, -1, length).sum(-1) == keep).all()
    for s, m in zip(scores.view(-1, length), mask.view(-1, length), strict=True):
        assert s[m].min() >= s[~m].max()


def test_alpha_is_the_papers_bisection():
    scores, target = drawn(16, 64) ** 3, 0.5
    ordered, order = scores.sort(dim=1)
    sums = ordered.cumsum(1)
    low, high = 0.0, 0.8
    for _ in range(50):
        alpha = (low + high) / 2
        fits = sums <= alpha * sums[:, -1:]
        low, high = (alpha, high) if fits.float().mean() <= target else (low, alpha)
    paper = torch.ones_like(fits).scatter_(1, order, ~(sums <= low * sums[:, -1:]))
    mask = patterns.by_alpha(scores, 512)
    assert (mask != paper).sum() <= 1
    assert len(set(mask.sum(1).tolist())) > 1


@pytest.mark.parametrize(
    ("options", "says"), [((2, None), "needs pruner.block_m"), ((4, 4), "smaller than")]
)
def test_half_a_pattern_is_refused(options, says):
    with pytest.raises(ConfigError, match=says):
        patterns.pattern(*options)


# ---- magnitude and Wanda


def test_wanda_is_the_brute_force_of_its_formula(llama, tokens):
    dense, seen = copy.deepcopy(llama), inputs_of(llama, tokens)
    out = prune(llama, tokens, schedule="whole")
    for g in out.groups:
        W, X = matrix(dense, g), seen[g.name]
        for i in range(W.shape[0]):
            score = (W[i].abs() * X.norm(dim=0)).tolist()
            gone = sorted(range(len(score)), key=score.__getitem__)[: len(score) // 2]
            assert set((~out.kept[g.name][i]).nonzero()[:, 0].tolist()) == set(gone)
        assert torch.equal(matrix(llama, g), W * out.kept[g.name])


def test_blocks_are_scored_behind_the_pruned_ones(llama, tokens):
    by_hand = copy.deepcopy(llama)
    out = prune(llama, tokens)
    for layer in range(3):
        seen = inputs_of(by_hand, tokens)
        for g in (g for g in out.groups if g.layer == layer):
            W = matrix(by_hand, g).detach()
            score = W.abs() * seen[g.name].norm(dim=0)
            assert (
                patterns.per_row(score, W.numel() // 2) == out.kept[g.name]
            ).float().mean() > 0.999
            W.mul_(out.kept[g.name])


def test_wanda_scores_do_not_change_with_scale(llama, tokens):
    groups = matrices(llama)
    first = criteria.build({"name": "wanda"})(llama, groups, WholeRun(llama, tokens))
    g = groups[0]
    masks = [
        patterns.per_row(first[g.name] * scale, g.units // 2)
        for scale in (1.0, 8.0, 2.0 ** torch.arange(g.shape[0])[:, None] % 7 + 1)
    ]
    assert all(torch.equal(m, masks[0]) for m in masks)


def test_wanda_beats_magnitude_where_an_input_is_large():
    W, X = drawn(16, 32) - 0.5, drawn(200, 32, seed=1) - 0.5
    X[:, 3] *= 20
    loss = {}
    for name, score in {"wanda": W.abs() * X.norm(dim=0), "magnitude": W.abs()}.items():
        loss[name] = ((W * ~patterns.per_row(score, 256)) @ X.T).norm()
    assert loss["wanda"] < loss["magnitude"]
    assert torch.equal(
        patterns.per_row(W.abs() * torch.full((32,), 3.0), 256), patterns.per_row(W.abs(), 256)
    )


@pytest.mark.parametrize("arch", ["gpt2", "gemma2", "gpt_neox", "phi3", "opt"])
def test_other_architectures(tiny_archs, tokens, arch):
    model = tiny_archs.tiny_model(arch, layers=2).eval()
    out = prune(model, tokens)
    for g in out.groups:
        W = matrix(model, g)  # (outputs, inputs), also where GPT-2 stores the transposed
        assert ((W == 0).sum(1) == W.shape[1] // 2).all()
    assert all(g.members[0].param.startswith(block_names(model)) for g in out.groups)
    with torch.no_grad():
        assert torch.isfinite(model(tokens).logits).all()


@pytest.mark.parametrize("options", [{"keep_n": 2, "block_m": 4}, {"keep_n": 4, "block_m": 8}])
def test_patterns_lie_along_the_inputs(tiny_archs, tokens, options):
    model = tiny_archs.tiny_model("gpt2", layers=2).eval()
    for g in prune(model, tokens, criterion="weight_magnitude", **options).groups:
        W = matrix(model, g)
        assert (
            (W != 0).reshape(W.shape[0], -1, options["block_m"]).sum(-1) == options["keep_n"]
        ).all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"keep_n": 2, "block_m": 4, "target": 0.3}, "ratio.target=0.5"),
        ({"keep_n": 2, "block_m": 5, "target": 0.6}, "does not divide"),
        ({"targets": ["wheels"]}, "there are: .*q_proj"),
        ({"scope": "model"}, "schedule=whole"),
    ],
)
def test_what_cannot_be_is_said_before_the_work(llama, tokens, options, says):
    with pytest.raises(ConfigError, match=says):
        prune(llama, tokens, **options)


def test_targets_and_exclusion_spare_the_rest(llama, tokens):
    before = copy.deepcopy(llama.state_dict())
    out = prune(
        llama,
        tokens,
        targets=["mlp.*", "q_proj"],
        exclude=lambda groups: [g for g in groups if g.layer == 1],
    )
    changed = {n for n, v in llama.state_dict().items() if not torch.equal(v, before[n])}
    assert changed == {g.members[0].param for g in out.groups}
    assert len(changed) == 4
    assert all(".layers.1." in n for n in changed)


# ---- OWL


def test_owls_shares():
    found = [1.0, 3.0, 2.0, 7.0]
    s = shares(found, [10] * 4, 0.7, 0.08)
    assert sum(s) / 4 == pytest.approx(0.7, abs=1e-9)
    assert max(s) - min(s) == pytest.approx(0.16, abs=1e-9)
    assert sorted(range(4), key=s.__getitem__) == sorted(
        range(4), key=found.__getitem__, reverse=True
    )
    assert shares([2.0, 2.0], [1, 1], 0.3, 0.1) == [0.3, 0.3]
    cut = shares(found, [10, 20, 30, 40], 0.05, 0.2)
    assert min(cut) == 0
    assert sum(a * b for a, b in zip(cut, [10, 20, 30, 40])) == pytest.approx(5)


def test_owl_without_spread_is_uniform(llama, tokens):
    twin = copy.deepcopy(llama)
    a, b = prune(llama, tokens, ratio={"name": "owl", "spread": 0.0}), prune(twin, tokens)
    assert a.notes == b.notes
    assert all(torch.equal(v, twin.state_dict()[k]) for k, v in llama.state_dict().items())


def test_owl_keeps_the_total(llama, tokens):
    groups = matrices(llama)
    counts = ratios.build({"name": "owl", "target": 0.7, "outlier": 2})(
        llama, groups, WholeRun(llama, tokens)
    )
    by_layer = [
        sum(counts[g.name] for g in groups if g.layer == i)
        / sum(g.units for g in groups if g.layer == i)
        for i in range(3)
    ]
    assert sum(by_layer) / 3 == pytest.approx(0.7, abs=1e-3)
    assert max(by_layer) - min(by_layer) == pytest.approx(0.16, abs=2e-3)


# ---- the product

ROWS = [
    ["criterion=wanda", "pruner=weights"],
    ["criterion=wanda", "pruner=weights", "pruner.scope=alpha"],
    ["criterion=weight_magnitude", "pruner=weights", "pruner.schedule=whole", "pruner.scope=model"],
    [
        "criterion=weight_magnitude",
        "pruner=weights",
        "pruner.schedule=whole",
        "pruner.scope=matrix",
    ],
    ["criterion=wanda", "pruner=weights", "pruner.keep_n=4", "pruner.block_m=8"],
    ["criterion=none", "pruner=sparsegpt"],
    ["criterion=none", "pruner=sparsegpt", "pruner.keep_n=2", "pruner.block_m=4"],
]
HALF = ["ratio.target=0.5", "ratio.of=prunable"]


@pytest.mark.parametrize("words", ROWS, ids=" ".join)
def test_zeros_are_counted_and_saved(words, tmp_path):
    record = run(config(*words, *HALF), tmp_path)
    gone = sum(units - kept for kept, units in record["kept"].values())
    assert gone == sum(units for _, units in record["kept"].values()) // 2
    model, _ = load(tmp_path / "checkpoint")
    assert sum(int((matrix(model, g) == 0).sum()) for g in matrices(model)) == gone
    assert record["results"]["pruned/params"] == record["results"]["dense/params"]


@pytest.mark.parametrize("words", ROWS, ids=" ".join)
def test_ratio_zero_changes_nothing(words, tmp_path):
    found = run(config(*words, "ratio.target=0", "save=false"), tmp_path)["results"]
    assert found["pruned/ppl_pydocs_32"] == found["dense/ppl_pydocs_32"]
    assert found["pruned/params_nonzero"] == found["dense/params_nonzero"]


@pytest.mark.parametrize("words", [ROWS[0], ROWS[2], ROWS[5]], ids=" ".join)
def test_owl_composes_with_all(words, tmp_path):
    record = run(
        config(*words, "ratio=owl", "ratio.target=0.6", "ratio.outlier=2", "save=false"), tmp_path
    )
    kept, units = map(sum, zip(*record["kept"].values(), strict=True))
    assert kept / units == pytest.approx(0.4, abs=0.01)


@pytest.mark.parametrize("words", [ROWS[0], ROWS[6]], ids=" ".join)
def test_zeros_survive_recovery(words, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a pruned model learns again what it can, and the zeros stay zeros. " * 40)
    short = [
        "recovery=lora_text",
        "recovery.dataset=text",
        f"recovery.path={text}",
        "recovery.cutoff=32",
        "recovery.holdout=0",
        "recovery.max_steps=2",
    ]
    short += [
        "recovery.lr=0.01",
        "recovery.warmup_steps=0",
        "recovery.batch=4",
        "recovery.micro_batch=4",
    ]
    record = run(config(*words, *HALF, *short), tmp_path / "run")
    found = record["results"]
    assert found["recovered/ppl_pydocs_32"] != found["pruned/ppl_pydocs_32"]
    model, _ = load(tmp_path / "run" / "checkpoint")
    zeros = {g.name: int((matrix(model, g) == 0).sum()) for g in matrices(model)}
    assert zeros == {name: units - kept for name, (kept, units) in record["kept"].items()}


def test_a_plan_needs_no_weights():
    from prunekit.cli.plan import forecast

    found = forecast(config("criterion=wanda", "pruner=weights", *HALF))
    assert found.pruned == found.dense
    assert {2 * kept for kept, _ in found.widths.values()} == {
        units for _, units in found.widths.values()
    }
