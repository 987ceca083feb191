"""Single weights: which elements go, by the rules of the papers, and the same through the product's
own runs.
"""

from __future__ import annotations

import copy

import pytest
import torch
from compositions import config
from foreign import ListedMixtral, with_an_idle_expert
from problems import problem, uniform
from tiny_models import tiny_model

from prunekit.activations.hooks import hook_activations
from prunekit.activations.runs import ModelRun
from prunekit.architecture.blocks import block_names
from prunekit.architecture.matrices import matrices, matrix, module_name
from prunekit.checkpoint import load
from prunekit.errors import ConfigError
from prunekit.registry import criteria, pruners
from prunekit.runner.run import run
from prunekit.selection.elements import per_row


@pytest.fixture
def llama():
    return tiny_model("llama", layers=3)


def prune(model, tokens, target=0.5, criterion="wanda", exclude=None, ratio=None, **options):
    """`ratio`: options of ratio=uniform."""
    pruner = pruners.build({"name": "unstructured", **options})
    node = uniform(target, **(ratio or {}))
    return pruner(
        problem(model, tokens, criterion={"name": criterion}, ratio=node, exclude=exclude)
    )


def drawn(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def inputs_of(model, tokens):
    """Group name -> all inputs of its module, as one matrix (tokens, inputs)."""
    seen = {}
    see = {
        module_name(g): lambda x, n=g.name: seen.setdefault(n, []).append(x)
        for g in matrices(model)
    }
    with hook_activations(model, see), torch.no_grad():
        model(tokens)
    return {n: torch.cat([x.reshape(-1, x.shape[-1]) for x in xs]) for n, xs in seen.items()}


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
            assert (per_row(score, W.numel() // 2) == out.kept[g.name]).float().mean() > 0.999
            W.mul_(out.kept[g.name])


def test_wanda_scores_do_not_change_with_scale(llama, tokens):
    groups = matrices(llama)
    first = criteria.build({"name": "wanda"})(llama, groups, ModelRun(llama, tokens))
    g = groups[0]
    masks = [
        per_row(first[g.name] * scale, g.units // 2)
        for scale in (1.0, 8.0, 2.0 ** torch.arange(g.shape[0])[:, None] % 7 + 1)
    ]
    assert all(torch.equal(m, masks[0]) for m in masks)


def test_wanda_beats_magnitude_where_an_input_is_large():
    W, X = drawn(16, 32) - 0.5, drawn(200, 32, seed=1) - 0.5
    X[:, 3] *= 20
    loss = {}
    for name, score in {"wanda": W.abs() * X.norm(dim=0), "magnitude": W.abs()}.items():
        loss[name] = ((W * ~per_row(score, 256)) @ X.T).norm()
    assert loss["wanda"] < loss["magnitude"]
    assert torch.equal(per_row(W.abs() * torch.full((32,), 3.0), 256), per_row(W.abs(), 256))


@pytest.mark.parametrize("arch", ["gpt2", "gemma2", "gpt_neox", "phi3", "opt"])
def test_every_output_loses_half_on_other_architectures(tokens, arch):
    model = tiny_model(arch)
    out = prune(model, tokens)
    for g in out.groups:
        W = matrix(model, g)  # (outputs, inputs), also where GPT-2 stores the transposed
        assert ((W == 0).sum(1) == W.shape[1] // 2).all()
    assert all(g.matrix.startswith(block_names(model)) for g in out.groups)
    with torch.no_grad():
        assert torch.isfinite(model(tokens).logits).all()


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8)])
def test_patterns_lie_along_the_inputs(tokens, n, m):
    model = tiny_model("gpt2")
    for g in prune(model, tokens, criterion="weight_magnitude", pattern=f"{n}:{m}").groups:
        W = matrix(model, g)
        assert ((W != 0).reshape(W.shape[0], -1, m).sum(-1) == n).all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"pattern": "2:4", "target": 0.3}, "ratio.target=0.5"),
        ({"pattern": "2:5", "target": 0.6}, "do not divide"),
        ({"targets": ["wheels"]}, "there are: .*q_proj"),
        ({"ratio": {"ranking": "global"}}, "schedule=whole"),
    ],
)
def test_what_cannot_be_is_said_before_the_work(llama, tokens, options, says):
    with pytest.raises(ConfigError, match=says):
        prune(llama, tokens, **options)


@pytest.mark.parametrize(
    "options", [{}, {"scope": "matrix"}, {"scope": "alpha"}, {"pattern": "2:4"}]
)
def test_of_an_expert_without_a_token_the_smallest_weights_go(tokens, options, caplog):
    torch.manual_seed(0)
    model = with_an_idle_expert(ListedMixtral()).eval()
    dense = copy.deepcopy(model)
    out = prune(model, tokens % 97, **options)
    plain = prune(dense, tokens % 97, criterion="weight_magnitude", **options)
    idle = [g.name for g in out.groups if ".experts.4." in g.name]
    assert idle
    assert all(torch.equal(out.kept[name], plain.kept[name]) for name in idle)
    assert [m.split()[0] for m in caplog.messages if "scores 0 throughout" in m] == idle


def test_targets_and_exclusion_spare_the_rest(llama, tokens):
    before = copy.deepcopy(llama.state_dict())
    out = prune(
        llama,
        tokens,
        targets=["mlp.*", "q_proj"],
        exclude=lambda groups: [g for g in groups if g.layer == 1],
    )
    changed = {n for n, v in llama.state_dict().items() if not torch.equal(v, before[n])}
    assert changed == {g.matrix for g in out.groups}
    assert len(changed) == 4
    assert all(".layers.1." in n for n in changed)


# ---- the product

ROWS = [
    ["criterion=wanda", "pruner=unstructured"],
    ["criterion=wanda", "pruner=unstructured", "pruner.scope=alpha"],
    ["criterion=weight_magnitude", "pruner=unstructured", "pruner.schedule=whole", "ratio=global"],
    [
        "criterion=weight_magnitude",
        "pruner=unstructured",
        "pruner.schedule=whole",
        "pruner.scope=matrix",
    ],
    ["criterion=wanda", "pruner=unstructured", "pruner.pattern='4:8'"],
    ["criterion=none", "pruner=sparsegpt"],
    ["criterion=none", "pruner=sparsegpt", "pruner.pattern='2:4'"],
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


@pytest.mark.parametrize("words", [ROWS[0], ROWS[3], ROWS[5]], ids=" ".join)
def test_owl_composes_with_all(words, tmp_path):
    record = run(
        config(*words, "ratio=owl", "ratio.target=0.6", "ratio.M=2", "save=false"), tmp_path
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
        "recovery.max_length=32",
        "recovery.validation_size=0",
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

    found = forecast(config("criterion=wanda", "pruner=unstructured", *HALF))
    assert found.pruned == found.dense
    assert {2 * kept for _, (kept, _) in found.widths} == {units for _, (_, units) in found.widths}
