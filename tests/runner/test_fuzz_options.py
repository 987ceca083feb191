"""Any value under any option of any component: refused with a ConfigError, or meant."""

from __future__ import annotations

import os
import traceback
from random import Random

import pytest
from fuzz_configs import drawn, method, names, node_of, usual
from fuzzing import ASKED, examples, within
from hypothesis import given
from hypothesis import strategies as st
from paths import ROOT
from tiny_models import tiny_model

from prunekit.errors import ConfigError, NotFinite
from prunekit.models.tiny import byte_tokenizer
from prunekit.runner.preflight import check
from prunekit.runner.run import run

ARCHITECTURES = ("gpt2", "mixtral", "mamba", "opt", "gemma2", "falcon", "qwen3_moe", "bamba")
TEXT = b"The snow had melted by the time they came back to the house. " * 200
FILES = {
    "good.txt": TEXT,
    "binary.txt": bytes(range(256)) * 20,
    "utf16.txt": TEXT.decode().encode("utf-16"),
    "latin.txt": "déjà vu ".encode("latin-1") * 300,
    "empty.txt": b"",
    "short.txt": b"one",
    "good.jsonl": b'{"text": "' + TEXT + b'"}\n',
    "numbers.jsonl": b'{"text": 3}\n' * 9,
    "lists.jsonl": b'["text"]\n' * 9,
    "null.jsonl": b'{"text": null}\n' * 9,
    "nested.jsonl": b'{"text": {"text": "a"}}\n' * 9,
    "other.jsonl": b'{"body": "a"}\n' * 9,
    "half.jsonl": b'{"text": "a"}\n{"text": ',
}


@pytest.fixture(scope="module")
def given_files(tmp_path_factory):
    """Folders of models, and text files; models only where many examples are asked for."""
    folder = tmp_path_factory.mktemp("given")
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    for arch in ARCHITECTURES if ASKED else ():
        tiny_model(arch, 4, vocab_size=300).save_pretrained(folder / arch)
        byte_tokenizer().save_pretrained(folder / arch)
    models = tuple(str(folder / a) for a in ARCHITECTURES if (folder / a).exists())
    return models, tuple(folder / name for name in FILES)


def outcome(cfg, folder):
    """In words; a raw error's words begin with RAW. Accepted ones are run where many are asked
    for.
    """
    try:
        with within(120):
            check(cfg)
            if not ASKED:
                return "accepted"
            run(cfg | {"save": False}, folder)
            return "ran"
    except (ConfigError, NotFinite) as e:
        return f"{type(e).__name__}: {e}"
    except Exception as e:  # noqa: BLE001  (it is what is looked for)
        return "RAW " + "".join(traceback.format_exception(e)[-4:])


def test_no_value_is_a_raw_error(given_files, tmp_path_factory):
    """`PRUNEKIT_FUZZ_LOG` names a file for what became of each."""
    raw = []

    @examples(50)
    @given(seed=st.integers(0, 2**63))
    def tried(seed):
        cfg, changed = drawn(Random(seed), *given_files)
        told = outcome(cfg, tmp_path_factory.mktemp("run"))
        line = f"{told[:600]!r} {cfg['pruner']!r:.60} {changed}"
        if told.startswith("RAW"):
            raw.append(line)
        if "PRUNEKIT_FUZZ_LOG" in os.environ:
            with open(os.environ["PRUNEKIT_FUZZ_LOG"], "a", errors="backslashreplace") as log:
                log.write(f"{line}\n")

    tried()
    assert not raw, "\n".join(raw)


def test_the_usual_compositions_are_accepted():
    check(usual())
    for kind in ("criterion", "ratio", "exclude", "pruner", "calib", "recovery", "eval"):
        assert all(isinstance(node_of(kind, name), dict) for name in names(kind))
    assert {p.stem for p in (ROOT / "conf" / "pruner").glob("*.yaml")} == set(names("pruner"))
    check(method("bonsai", "none", "uniform"))
    with pytest.raises(ConfigError):
        check(usual() | {"model": 3})
