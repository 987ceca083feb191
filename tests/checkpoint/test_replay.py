"""`pruning.json` and the dense model give the pruned model back, cut or zeroed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import llama
from torch import nn

from prunekit import graph
from prunekit.checkpoint import load, save
from prunekit.checkpoint.integrity import CheckpointError
from prunekit.checkpoint.remote_code.runtime_modules import Bypass, insert
from prunekit.checkpoint.replay import replay
from prunekit.errors import ConfigError


def pruned(folder: Path, kinds: tuple[str, ...], norm: str = "plain") -> nn.Module:
    model = llama()
    groups = graph.discover(model)
    generator = torch.Generator().manual_seed(0)
    kept = {}
    for i, group in enumerate(g for g in groups if g.kind in kinds):
        kept[group.name] = torch.ones(group.units, dtype=torch.bool)
        kept[group.name][torch.randperm(group.units, generator=generator)[: 1 + i % 2]] = False
    graph.remove(model, kept, norm=norm)
    save(
        model,
        None,
        folder,
        kept=kept,
        groups=groups,
        config={"pruner": {"name": "oneshot", "norm": norm}},
    )
    return model


@pytest.mark.parametrize(
    ("kinds", "norm"),
    [
        (("neurons", "heads"), "plain"),
        (("hidden",), "plain"),
        (("hidden",), "rescale"),
        (("blocks",), "plain"),
    ],
)
def test_replay_is_the_same_model(
    tmp_path: Path, tokens: torch.Tensor, kinds: tuple[str, ...], norm: str
) -> None:
    model = pruned(tmp_path / "out", kinds, norm)
    again = replay(llama(), tmp_path / "out")
    one, two = model.state_dict(), again.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, again(tokens).logits)
        assert torch.equal(model(tokens).logits, load(tmp_path / "out")[0](tokens).logits)


def test_zeroed_keeps_the_shapes(tmp_path: Path, tokens: torch.Tensor) -> None:
    model = pruned(tmp_path / "out", ("neurons", "heads"))
    masked = replay(llama(), tmp_path / "out" / "pruning.json", zeroed=True)
    assert {k: v.shape for k, v in masked.state_dict().items()} == {
        k: v.shape for k, v in llama().state_dict().items()
    }
    with torch.no_grad():
        torch.testing.assert_close(
            masked(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4
        )


def test_another_model_is_refused(tmp_path: Path) -> None:
    pruned(tmp_path / "out", ("neurons",))
    with pytest.raises(ConfigError, match="units"):
        replay(llama(intermediate_size=56), tmp_path / "out")
    with pytest.raises(ConfigError, match="not in this model"):
        replay(llama(num_hidden_layers=2), tmp_path / "out")


def test_damaged_record_is_refused(tmp_path: Path) -> None:
    pruned(tmp_path / "out", ("neurons",))
    file = tmp_path / "out" / "pruning.json"
    manifest = json.loads(file.read_text())
    manifest["groups"]["neurons.0"]["kept"][-1] = 64
    with pytest.raises(CheckpointError, match=r"neurons\.0.*out of range"):
        replay(llama(), manifest)
    file.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="seal"):
        replay(llama(), file)


def without_sublayers(folder: Path) -> nn.Module:
    """Saved: no attention in the first block, no feed-forward in the last one."""
    model = llama()
    groups = graph.discover(model)
    kept = {"neurons.1": torch.arange(64) >= 9}
    graph.remove(model, kept)
    insert(model, "model.layers.0.self_attn", Bypass(2))
    insert(model, "model.layers.2.mlp", Bypass())
    gone = {"heads.0": torch.zeros(3, dtype=torch.bool), "neurons.2": torch.arange(64) < 0}
    save(model, None, folder, kept=kept | gone, groups=groups)
    return model


@pytest.mark.parametrize("zeroed", [False, True])
def test_sublayers_that_went_go_again(tmp_path: Path, tokens: torch.Tensor, zeroed: bool) -> None:
    model = without_sublayers(tmp_path / "out")
    again = replay(llama(), tmp_path / "out", zeroed=zeroed)
    with torch.no_grad():
        assert torch.allclose(model(tokens).logits, again(tokens).logits, atol=1e-5)
    names = {n for n, _ in (llama() if zeroed else model).named_parameters()}
    assert {n for n, _ in again.named_parameters()} == names


@pytest.mark.parametrize(
    ("bypassed", "says"),
    [
        (["model.layers.0.mlp"], "must be a mapping"),
        ({"model.layers.0.nothing": 1}, "no sub-layer"),
        ({"": 1}, "no sub-layer"),
        ({"model.layers.0.mlp": 2**62}, "1 to 16"),
        ({"model.layers.0.mlp": "1"}, "1 to 16"),
    ],
)
def test_other_sublayers_are_refused(tmp_path: Path, bypassed: object, says: str) -> None:
    without_sublayers(tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "pruning.json").read_text())
    with pytest.raises(CheckpointError, match=says):
        replay(llama(), manifest | {"bypassed": bypassed})


def test_what_is_in_the_tensors_alone_is_not_made_again(tmp_path: Path) -> None:
    save(llama(), None, tmp_path / "out", config={"pruner": {"name": "slicegpt"}})
    with pytest.raises(ConfigError, match="names no units to remove"):
        replay(llama(), tmp_path / "out")
