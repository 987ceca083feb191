"""A pass by blocks that is cut off goes on with the block at which it was, to the same bits."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from compositions import config
from problems import problem, uniform
from tiny_models import tiny_model

from prunekit.activations import done_blocks
from prunekit.activations.blockwise import BlockRun
from prunekit.activations.done_blocks import packed, unpacked
from prunekit.registry import pruners
from prunekit.runner.finished import Finished
from prunekit.types import Allocation, Group

TOKENS = torch.randint(3, 100, (6, 16), generator=torch.Generator().manual_seed(0))
WANDA = {"name": "wanda"}
WEIGHTS = uniform(0.5, "prunable")


def some(problem: Any, groups: list[Group]) -> Allocation:
    """All units of the second block go, none of the third."""
    first, second, third, *others = groups
    counts = {first.name: 1, second.name: second.units, third.name: 0}
    return Allocation(counts | {g.name: 1 for g in others})


METHODS: dict[str, tuple[dict[str, Any], dict[str, Any] | None, Any]] = {
    "wanda": ({"name": "unstructured"}, WANDA, WEIGHTS),
    "sparsegpt": ({"name": "sparsegpt", "block": 16}, None, WEIGHTS),
    "admm": ({"name": "admm", "iterations": 4, "reselect": 2}, None, WEIGHTS),
    "alps": ({"name": "alps"}, None, WEIGHTS),
    "sparse_database": ({"name": "sparse_database", "block": 16}, None, WEIGHTS),
    "sparsellm": ({"name": "sparsellm", "block": 16, "steps": 2}, None, WEIGHTS),
    "flap": (
        {"name": "layerwise", "compensate": "bias"},
        {"name": "flap", "skip": 0},
        uniform(0.3),
    ),
    "obs": ({"name": "obs"}, None, uniform(0.3)),
    "obs_dense": ({"name": "obs", "target": "dense"}, None, uniform(0.3)),
    "database": ({"name": "database", "kinds": ["heads"], "levels": 2}, None, some),
}
EXPERTS: dict[str, tuple[dict[str, Any], dict[str, Any] | None, Any]] = {
    "reap": ({"name": "layerwise", "kinds": ["experts"]}, {"name": "experts"}, uniform(0.4)),
    "naee": ({"name": "naee"}, None, uniform(0.4)),
    "hc_smoe": ({"name": "hc_smoe"}, None, uniform(0.4)),
    "ream": ({"name": "ream"}, None, uniform(0.4)),
    "moe_pruner": ({"name": "moe_pruner"}, None, WEIGHTS),
}
COSTS = {"obs_cost": ({"name": "obs", "target": "dense"}, None, {"name": "cost", "target": 0.1})}


class CutOffError(Exception):
    """What a SIGKILL stands for here."""


def pruned(
    method: str, arch: str, store: str, folder: Any, cut: int | None = None, number: int = 0
) -> Any:
    """A model of five blocks after `method`, which ends before block `cut` of its pass `number`;
    and the blocks at which something was computed.
    """
    pruner, criterion, ratio = (METHODS | EXPERTS | COSTS)[method]
    computed: list[int] = []
    passes: list[Any] = []

    def once(run: BlockRun, compute: Any, changes: Any = ()) -> Any:
        if run.inputs not in passes:
            passes.append(run.inputs)
        if (run.block, len(passes) - 1) == (cut, number):
            raise CutOffError

        def noted() -> Any:
            computed.append(run.block)
            return compute()

        return plain(run, noted, changes)

    plain = BlockRun.once
    asked = problem(tiny_model(arch, layers=5), TOKENS, criterion=criterion, ratio=ratio)
    if folder is not None:
        kept = Finished(folder, config(), models=True)
        asked = dataclasses.replace(asked, passes=kept.passes("pruned"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(done_blocks, "SECONDS", 0.0)
        patch.setattr(BlockRun, "once", once)
        try:
            return pruners.build({**pruner, "store": store})(asked), computed
        except CutOffError:
            return None, computed


def assert_same(found: Any, expected: Any) -> None:
    a, b = found.model.state_dict(), expected.model.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    for mine, theirs in ((found.kept, expected.kept), (found.scores, expected.scores)):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert found.notes == expected.notes


@pytest.mark.parametrize(
    ("method", "arch"),
    [(m, arch) for m in METHODS for arch in ("llama", "opt")]
    + [(m, arch) for m in EXPERTS for arch in ("mixtral", "qwen3_moe")],
)
def test_a_pass_that_was_cut_off_goes_on_to_the_same_bits(method, arch, tmp_path):
    expected, all_blocks = pruned(method, arch, "memory", None)
    assert all_blocks == [0, 1, 2, 3, 4]
    assert pruned(method, arch, "memory", tmp_path, cut=2) == (None, [0, 1])
    assert pruned(method, arch, "memory", tmp_path, cut=4) == (None, [2, 3])
    found, computed = pruned(method, arch, "memory", tmp_path)
    assert computed == [4]
    assert_same(found, expected)


def test_the_costs_of_units_and_the_choice_by_them_go_on_each_where_it_was(tmp_path):
    expected, _ = pruned("obs_cost", "llama", "memory", None)
    assert pruned("obs_cost", "llama", "memory", tmp_path, cut=2) == (None, [0, 1])
    cut_in_choice = pruned("obs_cost", "llama", "memory", tmp_path, cut=3, number=1)
    assert cut_in_choice == (None, [2, 3, 4, 0, 1, 2])
    found, computed = pruned("obs_cost", "llama", "memory", tmp_path)
    assert computed == [4, 3, 4]
    assert_same(found, expected)


@pytest.mark.parametrize("store", ["bfloat16", "disk"])
def test_inputs_that_wait_elsewhere_come_back_as_they_were(store, tmp_path):
    expected, _ = pruned("wanda", "llama", store, None)
    assert pruned("wanda", "llama", store, tmp_path, cut=3) == (None, [0, 1, 2])
    found, computed = pruned("wanda", "llama", store, tmp_path)
    assert computed == [3, 4]
    assert_same(found, expected)


@pytest.mark.parametrize("part", ["block-1", "inputs-3-0", "position"])
def test_a_damaged_part_is_named_and_all_is_done_again(part, tmp_path, caplog):
    expected, _ = pruned("sparsegpt", "llama", "memory", None)
    pruned("sparsegpt", "llama", "memory", tmp_path, cut=3)
    (file,) = tmp_path.glob(f"stages/*/*{part}-*")
    file.write_bytes(file.read_bytes()[:-3] + b"abc")
    found, computed = pruned("sparsegpt", "llama", "memory", tmp_path)
    assert computed == [0, 1, 2, 3, 4]
    assert file.name in caplog.text
    assert "starts anew" in caplog.text
    assert_same(found, expected)


def test_inputs_of_one_block_are_kept_and_none_of_those_before(tmp_path):
    pruned("wanda", "llama", "memory", tmp_path, cut=3)
    names = {f.name.split("pass-")[1].split("-tensors")[0] for f in tmp_path.glob("stages/*/*")}
    assert names == {"position", "inputs-3-0", "block-0", "block-1", "block-2"}


def test_a_short_pass_writes_nothing(tmp_path, monkeypatch):
    asked = problem(tiny_model("llama"), TOKENS, criterion=WANDA, ratio=WEIGHTS)
    kept = Finished(tmp_path, config(), models=True)
    asked = dataclasses.replace(asked, passes=kept.passes("pruned"))
    pruners.build({"name": "unstructured"})(asked)
    assert not list(tmp_path.rglob("*.entry"))


def test_numbers_and_tensors_keep_their_bits():
    third = torch.tensor([1 / 3], dtype=torch.bfloat16)
    found = packed(a={"x": 1 / 3}, b={"x": third})
    assert float(unpacked(found, "a")["x"]) == 1 / 3
    assert torch.equal(unpacked(found, "b")["x"], third)
