"""Things in a folder that are no plain files, and sizes that no file has: refused with the file's
name, within seconds and 64 MB.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import change_json, llama, resealed

from prunekit import registry
from prunekit.checkpoint import bitmask, load, outline, save
from prunekit.checkpoint.integrity import CheckpointError
from prunekit.checkpoint.manifest import MANIFEST
from prunekit.checkpoint.replay import replay
from prunekit.errors import ConfigError

ROOM = 64 * 2**20


def pair(top: Path, packed: bool) -> Path:
    model = llama(tie=False)
    with torch.no_grad():
        for p in model.model.layers.parameters():
            p.mul_(torch.arange(p.numel()).view(p.shape) % 4 == 0)
    tokenizer = registry.models.build({"name": "tiny_llama", "layers": 1})()[1]
    return save(model, tokenizer, top / "out", packed=packed)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return pair(tmp_path_factory.mktemp("files"), packed=False)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(whole, tmp_path / "out"))


def attempt(folder: Path, answer: Any) -> None:
    """Loads with 64 MB more than there are, and says how it ended."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (now + ROOM, now + ROOM))
    try:
        load(folder)
        answer.put(("loaded", ""))
    except BaseException as error:  # noqa: BLE001 (whatever comes is the answer)
        answer.put((type(error).__name__, str(error)))


def told(folder: Path) -> str:
    """The message of the refusal; anything else fails."""
    context = multiprocessing.get_context("fork")
    answer = context.SimpleQueue()
    process = context.Process(target=attempt, args=(folder, answer))
    process.start()
    process.join(30)
    if process.is_alive():
        process.kill()
        pytest.fail("it hangs")
    kind, words = answer.get() if not answer.empty() else (f"exit {process.exitcode}", "")
    assert kind == "CheckpointError", (kind, words)
    return words


def weights(folder: Path) -> Path:
    return next(iter(sorted(folder.glob("*.safetensors"))))


@pytest.mark.parametrize("name", ["config.json", "pruning.json", "weights", "README.md", "sub/x"])
@pytest.mark.parametrize("kind", ["fifo", "device", "loop", "out", "nowhere", "folder"])
def test_what_is_no_plain_file_is_named(folder: Path, kind: str, name: str) -> None:
    path = weights(folder) if name == "weights" else folder / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        if name in ("README.md", "sub/x"):
            return
        path.mkdir()
    else:
        loop = {"device": "/dev/zero", "loop": path.name, "out": "/etc/hostname"}
        path.symlink_to(loop.get(kind, "nothing-here"))
    assert path.name in told(folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_adapters_are_not_picked_up(folder: Path, name: str) -> None:
    (folder / name).write_text("{}")
    assert f"{name}: adapters" in told(folder)


@pytest.mark.parametrize("name", ["added_tokens.json", "chat_template.jinja", "x.safetensors"])
def test_files_that_a_loader_would_read_must_be_listed(folder: Path, name: str) -> None:
    (folder / name).write_text("{}")
    assert f"{name}: not among the files" in told(folder)


JSON = [b"\xff\xfe{}", b"", b"[1]", b"null", b"{", b'{"a": ' + b"9" * 5000 + b"}", b"[" * 10**5]
JSON += [b'{"a": "\xed\xa0\x80"}']


@pytest.mark.parametrize("content", JSON, ids=lambda c: repr(c[:12]))
@pytest.mark.parametrize(
    "name",
    ["config.json", MANIFEST, "tokenizer.json", "tokenizer_config.json", "generation_config.json"],
)
def test_bytes_that_are_no_json_are_refused(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    if name != MANIFEST:
        resealed(folder)
    assert name in told(folder)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("generation_config.json", "output_hidden_states", {"": 1}),
        ("config.json", "attention_dropout", 2),
        ("generation_config.json", "use_cache", 3),
        ("generation_config.json", "eos_token_id", "two"),
        ("generation_config.json", "eos_token_id", [1, True]),
        ("generation_config.json", "pad_token_id", -5),
        ("tokenizer_config.json", "tokenizer_class", ["PreTrainedTokenizerFast"]),
        ("tokenizer_config.json", "tokenizer_class", None),
        ("tokenizer_config.json", "backend", [[], 198]),
    ],
)
def test_values_that_transformers_takes_and_nobody_can_mean_are_refused(
    folder: Path, name: str, key: str, value: Any
) -> None:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | {key: value}))
    resealed(folder)
    assert f"{name}: {key} is {value!r}" in told(folder)


def test_half_a_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    resealed(folder)
    assert "tokenizer_config.json is not among the files" in told(folder)


def test_a_large_file_is_refused_by_its_size(folder: Path) -> None:
    for name in ("config.json", MANIFEST, "tokenizer.json"):
        before = (folder / name).read_bytes()
        os.truncate(folder / name, 2**40)  # holes: nothing is on the disk
        assert name in told(folder)
        (folder / name).write_bytes(before)
    os.truncate(weights(folder), 2**40)
    assert weights(folder).name in told(folder)


def header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The header of a safetensors file, changed in place."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    fields = json.loads(content[8 : 8 + length])
    change(fields)
    text = json.dumps(fields).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


NAME = "lm_head.weight"


@pytest.mark.parametrize(
    "entry",
    [
        {"shape": [2**62, 2**62]},
        {"shape": [-1, 48]},
        {"shape": [100.0, 48]},
        {"shape": [True, 48]},
        {"shape": "100x48"},
        {"shape": [1] * 100},
        {"data_offsets": [0, 2**62]},
        {"data_offsets": [-8, 0]},
        {"data_offsets": None},
        {"dtype": "F31"},
        {"dtype": None},
        {"dtype": "F64"},
    ],
    ids=str,
)
def test_every_field_of_a_header_is_checked(folder: Path, entry: dict[str, Any]) -> None:
    header(weights(folder), lambda h: h[NAME].update(entry))
    resealed(folder)
    words = told(folder)
    assert weights(folder).name in words
    assert NAME in words


@pytest.mark.parametrize("value", [[1], {"a": 1}, "x"], ids=str)
def test_notes_of_a_header_are_strings(folder: Path, value: Any) -> None:
    header(weights(folder), lambda h: h.update({"__metadata__": value}))
    resealed(folder)
    assert "__metadata__" in told(folder)


@pytest.mark.parametrize("value", [2**62, 2**40, -5], ids=str)
@pytest.mark.parametrize(
    "field",
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim max_position_embeddings".split(),
)
def test_no_size_of_the_config_is_believed(folder: Path, field: str, value: int) -> None:
    if field == "max_position_embeddings" and value < 0:
        return
    change_json(folder / "config.json", lambda c: c.update({field: value}))
    resealed(folder)
    words = told(folder)
    assert "config.json" in words
    assert field in words
    if field != "vocab_size" or value == 2**62:
        with pytest.raises(CheckpointError, match=field):
            outline(folder)


@pytest.mark.parametrize(
    "shapes",
    ["{", "[]", '{"w": 3}', '{"NAME": [-1, 8]}', '{"NAME": [4611686018427387904]}', '{"w": [8]}'],
)
def test_shapes_of_packed_tensors_are_checked(tmp_path: Path, shapes: str) -> None:
    folder = pair(tmp_path, True)
    name = "model.layers.0.mlp.up_proj.weight"

    def change(h: dict[str, Any]) -> None:
        h["__metadata__"][bitmask.SHAPES] = shapes.replace("NAME", name)

    header(weights(folder), change)
    resealed(folder)
    assert weights(folder).name in told(folder)


def test_a_packed_file_is_looked_at_like_any_other(tmp_path: Path) -> None:
    folder = pair(tmp_path, True)
    load(folder)
    path = weights(folder)
    before = path.read_bytes()
    for change in ({"shape": [2**62, 2**62]}, {"data_offsets": [0, 2**62]}, {"dtype": "F31"}):
        header(path, lambda h, change=change: h[NAME].update(change))
        resealed(folder)
        assert NAME in told(folder)
        path.write_bytes(before)
    path.write_bytes(before[:-1])
    resealed(folder)
    assert "truncated" in told(folder)
    path.unlink()
    os.mkfifo(path)
    assert "not a plain file" in told(folder)


@pytest.mark.parametrize("field", ["dtype", "values", "bits"])
def test_masks_and_values_have_their_type_and_size(tmp_path: Path, field: str) -> None:
    from safetensors.torch import load_file, save_file

    folder = pair(tmp_path, True)
    path = weights(folder)
    content = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    shapes = json.loads(json.dumps({n: [] for n in content}))
    with path.open("rb") as f:
        length = struct.unpack("<Q", f.read(8))[0]
        shapes = json.loads(f.read(length))["__metadata__"]
    if field == "dtype":
        content[name + bitmask.BITS] = content[name + bitmask.BITS].to(torch.int16)
    elif field == "values":
        content[name + bitmask.VALUES] = content[name + bitmask.VALUES][:-1]
    else:
        content[name + bitmask.BITS] = content[name + bitmask.BITS][:-1]
    save_file(content, path, shapes)
    resealed(folder)
    assert name in told(folder)


def test_units_beyond_the_model_are_not_allocated_by_replay(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    entry = {"kind": "neurons", "layer": 0, "units": 2**62, "kept": [0]}
    resealed(folder, groups=manifest["groups"] | {"neurons.0": entry})
    with pytest.raises(ConfigError, match=r"neurons\.0.*4611686018427387904 units"):
        replay(llama(), folder)


def test_a_folder_of_others_is_looked_at_before_it_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="config.json is not a plain file"):
        registry.models.build({"name": "hf", "path": str(tmp_path)})()
