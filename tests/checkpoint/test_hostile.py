"""Damaged and hostile folders: refused with file and field, nothing executed, nothing half-loaded,
nothing half-written.
"""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import change_json, llama, resealed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prunekit import graph
from prunekit.checkpoint import load, save
from prunekit.checkpoint.integrity import CheckpointError
from prunekit.checkpoint.manifest import MANIFEST

FUZZ = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in shards, with layers that differ and groups on record."""
    model = llama()
    groups = graph.discover(model)
    kept = {
        g.name: torch.arange(g.units) >= 1 + (g.layer or 0) for g in groups if g.kind == "neurons"
    }
    graph.remove(model, kept)
    return save(
        model,
        None,
        tmp_path_factory.mktemp("hostile") / "out",
        kept=kept,
        groups=groups,
        max_shard_size="60KB",
    )


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    import shutil

    return Path(shutil.copytree(whole, tmp_path / "out"))


@FUZZ
@given(data=st.data())
def test_any_flipped_bit_in_any_file_is_found(whole: Path, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from(sorted(p for p in whole.iterdir())), label="file")
    before = file.read_bytes()
    at = data.draw(st.integers(0, len(before) * 8 - 1), label="bit")
    damaged = bytearray(before)
    damaged[at // 8] ^= 1 << at % 8
    try:
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=file.name.replace(".", r"\.")):
            load(whole)
    finally:
        file.write_bytes(before)


@FUZZ
@given(data=st.data())
def test_truncation_is_found_even_with_matching_hashes(whole: Path, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from(sorted(whole.glob("*.safetensors"))), label="file")
    before, manifest = file.read_bytes(), (whole / MANIFEST).read_bytes()
    try:
        file.write_bytes(before[: data.draw(st.integers(0, len(before) - 1), label="length")])
        resealed(whole)
        with pytest.raises(CheckpointError, match=file.name.replace(".", r"\.")):
            load(whole)
    finally:
        file.write_bytes(before)
        (whole / MANIFEST).write_bytes(manifest)


SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)


@FUZZ
@given(
    field=st.sampled_from(SIZES),
    value=st.one_of(st.integers(-3, 200), st.none(), st.text(max_size=3), st.floats(0, 9)),
)
def test_config_that_does_not_fit_the_weights(whole: Path, field: str, value: Any) -> None:
    file = whole / "config.json"
    before, manifest = file.read_bytes(), (whole / MANIFEST).read_bytes()
    if json.loads(before)[field] == value:
        return
    try:
        change_json(file, lambda c: c.update({field: value}))
        resealed(whole)
        told = refused(whole)
        if told is not None:
            assert "config.json" in told or "safetensors" in told
        else:  # a size that plays no part once every tensor has its shape from the layout
            assert {k: v.shape for k, v in load(whole)[0].state_dict().items()} == shapes(whole)
    finally:
        file.write_bytes(before)
        (whole / MANIFEST).write_bytes(manifest)


def refused(folder: Path) -> str | None:
    """The message with which a folder is refused, or None where it loads."""
    try:
        load(folder)
    except CheckpointError as error:
        return str(error)
    return None


def shapes(folder: Path) -> dict[str, torch.Size]:
    from safetensors.torch import load_file

    return {k: v.shape for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def shape(name: str, text: str):
    """A change of config.json: another shape for a tensor."""
    return lambda c: c["prunekit_layout"]["shapes"].update({f"model.layers.{name}": text})


def layout(**fields: Any):
    return lambda c: c["prunekit_layout"].update(fields)


def field(**fields: Any):
    return lambda c: c.update(fields)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (shape("0.mlp.up_proj.weight", "40x48"), "up_proj"),
        (shape("0.mlp.up_proj.weight", "0x48"), "up_proj"),
        (shape("9.mlp.up_proj.weight", "40x48"), r"layers\.9"),
        (shape("0.mlp.forward", "4"), "forward|unexpected|missing"),
        (layout(attributes={"model.norm.forward": 3}), "forward"),
        (layout(attributes={"model.norm.variance_epsilon": "import os"}), "variance_epsilon"),
        (layout(code="x"), "code"),
        (field(architectures=["PrunedOs"]), "architectures"),
        (field(architectures=["AutoModel"]), "architectures"),
        (field(architectures=["GPT2LMHeadModel"]), "architectures"),
        (field(model_type="../../etc"), "model_type"),
        (field(quantization_config={"quant_method": "bitsandbytes"}), "quantization_config"),
        (field(attn_implementation="evil/kernel"), "attn_implementation"),
        (layout(modules=[{"path": "model.norm", "kind": "bypass", "outputs": 2**62}]), "outputs"),
        (layout(modules=[{"path": "model.x", "kind": "low_rank", "inputs": -1}]), "model.x"),
    ],
)
def test_config_fields_are_checked(folder: Path, change, words: str) -> None:
    change_json(folder / "config.json", change)
    resealed(folder)
    with pytest.raises(CheckpointError, match=words):
        load(folder)


def test_remote_code_in_the_folder_is_never_run(folder: Path, tmp_path: Path) -> None:
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass PrunedLlamaForCausalLM: pass\n"
    (folder / "modeling_pruned.py").write_text(code)
    manifest = json.loads((folder / MANIFEST).read_text())
    resealed(folder, files=manifest["files"] | {"modeling_pruned.py": "0"})
    resealed(folder)
    load(folder)
    assert not (tmp_path / "ran").exists()
    (folder / "evil.py").write_text(code)
    with pytest.raises(CheckpointError, match=r"evil\.py: code of others"):
        load(folder)
    (folder / "evil.py").unlink()
    change_json(folder / "config.json", lambda c: c.update({"auto_map": {"AutoConfig": "evil.X"}}))
    resealed(folder)
    with pytest.raises(CheckpointError, match=r"auto_map\.AutoConfig is 'evil\.X'"):
        load(folder)
    assert not (tmp_path / "ran").exists()


class Bomb:
    def __init__(self, target: str):
        self.target = target

    def __reduce__(self):
        return open, (self.target, "w")


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "sub/weights.pt", "model.PTH", "optimizer.pkl"]
)
def test_a_pickle_is_refused_by_name(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(pickle.dumps(Bomb(str(tmp_path / "ran"))))
    with pytest.raises(CheckpointError, match=Path(name).name.replace(".", r"\.")):
        load(folder)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_in_disguise_is_refused(folder: Path, tmp_path: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(pickle.dumps(Bomb(str(tmp_path / "ran"))))
    resealed(folder)
    with pytest.raises(CheckpointError, match=file.name):
        load(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "a/../../b", "..", "", "c\\..\\d"]
)
def test_paths_that_climb_out(folder: Path, name: str) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    resealed(folder, files={**manifest["files"], name: "0"})
    with pytest.raises(CheckpointError, match="files"):
        load(folder)


def test_links_that_lead_out(folder: Path, tmp_path: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    file.rename(tmp_path / file.name)
    file.symlink_to(tmp_path / file.name)
    with pytest.raises(CheckpointError, match="leads out"):
        load(folder)


def test_shards_named_by_the_index_stay_inside(folder: Path) -> None:
    change_json(
        folder / "model.safetensors.index.json",
        lambda c: c["weight_map"].update({"lm_head.weight": "../../x.safetensors"}),
    )
    resealed(folder)
    with pytest.raises(CheckpointError, match="index"):
        load(folder)


@pytest.mark.parametrize("kept", [[0, 64], [-1, 3], [3, 3], [5, 1], [1.5], "all", None, [True]])
def test_kept_indices_are_checked(folder: Path, kept: Any) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["groups"]["neurons.0"]["kept"] = kept
    resealed(folder, groups=manifest["groups"])
    with pytest.raises(CheckpointError, match=r"neurons\.0.*kept"):
        load(folder)


@FUZZ
@given(header=st.binary(max_size=64), length=st.integers(0, 2**64 - 1))
def test_any_bytes_for_weights(whole: Path, header: bytes, length: int) -> None:
    file = sorted(whole.glob("*.safetensors"))[0]
    before, manifest = file.read_bytes(), (whole / MANIFEST).read_bytes()
    try:
        file.write_bytes(struct.pack("<Q", length) + header)
        resealed(whole)
        with pytest.raises(CheckpointError, match=file.name):
            load(whole)
    finally:
        file.write_bytes(before)
        (whole / MANIFEST).write_bytes(manifest)


def test_a_missing_file_or_tensor_is_named(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = sorted(folder.glob("*.safetensors"))[0]
    content = load_file(file)
    gone = sorted(content)[0]
    del content[gone]
    save_file(content, file, metadata={"format": "pt"})
    resealed(folder)
    with pytest.raises(CheckpointError, match=gone.replace(".", r"\.")):
        load(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match=file.name):
        load(folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=MANIFEST):
        load(folder)


@pytest.mark.parametrize(
    ("blocks", "says"),
    [
        ([], "must be a mapping"),
        ({"model.layer": {"of": 4, "keep": [0, 1]}}, "of no list of modules"),
        ({"model.layers": 3}, "of no list of modules"),
        ({"model.layers": {"of": "4", "keep": [0, 1]}}, "of no list of modules"),
        ({"model.layers": {"of": 4, "keep": [0, 4]}}, "integers below 4"),
        ({"model.layers": {"of": 4, "keep": "01"}}, "integers below 4"),
        ({"model.layers": {"of": 4, "keep": [1, 0]}}, "must ascend"),
        ({"model.layers": {"of": 9, "keep": [0, 1, 2, 3, 4, 5, 6, 7]}}, "one for each of"),
    ],
)
def test_blocks_that_are_left_are_checked(folder: Path, blocks: Any, says: str) -> None:
    resealed(folder, blocks=blocks)
    with pytest.raises(CheckpointError, match=says):
        load(folder)
