"""Any damage to any file of a checkpoint, with hashes that fit or not: refused with a
CheckpointError, or harmless.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from checkpoints import llama as small
from checkpoints import resealed
from fuzzing import at, examples, leaves, like, put, values, within
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from prunekit import registry
from prunekit.checkpoint import load, save
from prunekit.checkpoint.integrity import CheckpointError
from prunekit.checkpoint.manifest import MANIFEST
from prunekit.checkpoint.remote_code.early_exit import EarlyExit
from prunekit.checkpoint.remote_code.runtime_modules import (
    KINDS,
    ArgumentIndices,
    Bypass,
    Gather,
    LowRank,
    insert,
    kind_of,
)
from prunekit.checkpoint.remote_code.stream_modules import LateSum, Rotation


def with_modules(model: nn.Module) -> nn.Module:
    """One module of each kind that no class has."""
    layers = model.model.layers
    q, k = layers[0].self_attn.q_proj, layers[0].self_attn.k_proj
    order = Gather.before(k, torch.randperm(48))
    late, turn = LateSum(48, 48, "model.norm"), Rotation(48, 48)
    torch.nn.init.normal_(late.weight)
    torch.nn.init.orthogonal_(turn.weight)
    insert(model, "model.layers.0.self_attn.q_proj", LowRank.of(q.weight[:, :5], q.weight[:5]))
    insert(model, "model.layers.0.self_attn.k_proj", order)
    insert(model, "model.layers.1.rotation", turn)
    insert(model, "model.layers.1.self_attn", Bypass(outputs=2))
    insert(model, "model.layers.2.mlp.late_sum", late)
    argument = ArgumentIndices("hidden_states", 2, 48, list(range(48)))
    insert(model, "model.layers.2.mlp.argument", argument)
    exits = EarlyExit("model.layers", "model.norm", "lm_head", "mlp.down_proj", 1, 1)
    torch.nn.init.normal_(exits.weight)
    insert(model, "model.early_exit", exits)
    assert {kind_of(m) for m in model.modules()} == {None, *KINDS}
    return model


@pytest.fixture(scope="module", params=["plain", "packed", "modules"])
def whole(request, tmp_path_factory) -> Path:
    model = small()
    for p in model.model.layers.parameters():
        p.data[..., ::2] = 0
    if request.param == "modules":
        with_modules(model)
    tokenizer = registry.models.build({"name": "tiny_llama", "layers": 1})()[1]
    folder = tmp_path_factory.mktemp("fuzz") / "out"
    return save(model, tokenizer, folder, packed=request.param == "packed", max_shard_size="60KB")


FEW = 40
"""Examples of each checkpoint where nobody asks for more."""
HOW = ["flip", "cut", "random", "gone", "other", "json", "json", "header"]


def damage(draw, folder: Path) -> str:
    """One change to one file, in words."""
    path = folder / draw(st.sampled_from(sorted(p.name for p in folder.iterdir())))
    content = path.read_bytes()
    how, what = draw(st.sampled_from(HOW)), ""
    if how == "flip" and content:
        at = draw(st.integers(0, len(content) - 1))
        changed = bytearray(content)
        changed[at] ^= draw(st.integers(1, 255))
        path.write_bytes(changed)
    elif how == "cut":
        path.write_bytes(content[: draw(st.integers(0, len(content)))])
    elif how == "random":
        path.write_bytes(draw(st.binary(max_size=200)))
    elif how == "gone":
        path.unlink()
    elif how == "other":
        path.write_bytes((folder / draw(st.sampled_from(sorted(os.listdir(folder))))).read_bytes())
    elif how == "json" and path.suffix == ".json":
        node, what = changed_json(draw, json.loads(content))
        path.write_text(json.dumps(node))
    elif how == "header" and path.suffix == ".safetensors":
        size = struct.unpack("<Q", content[:8])[0]
        header, what = changed_json(draw, json.loads(content[8 : 8 + size]))
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    return f"{how} {path.name} {what}" if not path.exists() or path.read_bytes() != content else ""


def changed_json(draw, node):
    """Another value somewhere in it, and which."""
    place = draw(st.sampled_from([(), *leaves(node)]))
    value = draw(values | like(at(node, place)))
    if not place:
        return value, f"= {value!r:.60}"
    what = f"{'.'.join(map(str, place))}: {at(node, place)!r:.60} -> {value!r:.60}"
    put(node, place, value)
    return node, what


@examples(FEW)
@given(data=st.data())
def test_no_damage_is_a_raw_error(whole, tmp_path_factory, data) -> None:
    folder = Path(shutil.copytree(whole, tmp_path_factory.mktemp("run") / "out"))
    done = [damage(data.draw, folder)]
    if data.draw(st.booleans()):
        with suppress(ValueError, struct.error, AttributeError):  # what is no JSON any more
            done.append(damage(data.draw, folder))
    if data.draw(st.booleans()) and (folder / MANIFEST).is_file():
        with suppress(ValueError, KeyError, TypeError, AttributeError):  # nothing left to seal
            resealed(folder)
            done.append("resealed")
    told = str(folder)
    try:
        with within(60):
            load(folder)
    except CheckpointError as error:
        told = str(error)
    shutil.rmtree(folder)
    if "PRUNEKIT_FUZZ_LOG" in os.environ:
        with open(os.environ["PRUNEKIT_FUZZ_LOG"], "a", errors="backslashreplace") as log:
            log.write(f"{told!r} {[d for d in done if d]}\n")
    assert str(folder) in told or any(p.name in told for p in whole.iterdir())
