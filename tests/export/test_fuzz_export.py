"""`prunekit export` of any folder, in any form, to any place: written, or refused in words; the
checkpoint stays as it was.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from checkpoints import llama, uneven
from fuzzing import ASKED, examples, within
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_model

from prunekit.checkpoint import save
from prunekit.checkpoint.remote_code.runtime_modules import LowRank, insert
from prunekit.cli.main import main
from prunekit.models.tiny import byte_tokenizer

FORMS = ["gguf", "nemotron-nas", "list", "onnx", ""]
TYPES = ["f32", "f16", "bf16", "q8_0", "q4_k", "-1"]
OUT = ["new", "file.txt", "folder", "full", "missing/new", "loop", "", "/proc/none", "x" * 300]
"""Where to; relative to a folder of their own."""


def factored():
    model = llama()
    q = model.model.layers[0].self_attn.q_proj
    insert(
        model,
        "model.layers.0.self_attn.q_proj",
        LowRank.of(q.weight.data[:, :5], q.weight.data[:5]),
    )
    return model


MAKE = {"plain": llama, "uneven": lambda: uneven(llama(vocab_size=300)), "factored": factored}
MORE = {arch: lambda arch=arch: tiny_model(arch, vocab_size=300) for arch in ("gpt2", "mamba")}


@pytest.fixture(scope="module")
def given_folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    for name, make in (MAKE | (MORE if ASKED else {})).items():
        save(make(), byte_tokenizer(), folder / name)
    save(llama(), None, folder / "silent")
    (folder / "empty").mkdir()
    (folder / "file").write_text("{}")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@examples(12)
@given(data=st.data())
def test_every_export_ends_in_words(given_folders, tmp_path_factory, data, capfd):
    places = tmp_path_factory.mktemp("out")
    (places / "file.txt").write_text("mine")
    (places / "folder").mkdir()
    (places / "full").mkdir()
    (places / "full" / "mine.txt").write_text("mine")
    (places / "loop").symlink_to(places / "loop")
    before = contents(given_folders)
    source = data.draw(st.sampled_from([*MAKE, *MORE, "silent", "empty", "file", "none"]))
    words = [str(given_folders / source)]
    words += ["--to", data.draw(st.sampled_from(FORMS[:3] * 2 + FORMS))]
    if data.draw(st.booleans()):
        words += ["--type", data.draw(st.sampled_from(TYPES))]
    if data.draw(st.booleans()):
        out = data.draw(st.sampled_from([*OUT, str(given_folders / source), "/"]))
        words += ["--out", out if out.startswith("/") else str(places / out)]
    with within(60):
        try:
            status = main(["export", *words])
        except SystemExit as e:  # argparse
            status = e.code
    said = "".join(capfd.readouterr())
    if "PRUNEKIT_FUZZ_LOG" in os.environ:
        with open(os.environ["PRUNEKIT_FUZZ_LOG"], "a", errors="backslashreplace") as log:
            log.write(f"{status} {said[-300:]!r} {words[1:]} {source}\n")
    assert status in (0, 1, 2)
    assert status == 0 or "prunekit" in said
    assert before.items() <= contents(given_folders).items()
    assert (places / "full" / "mine.txt").read_text() == "mine"
