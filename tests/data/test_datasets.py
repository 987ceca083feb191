"""Text: parts that never overlap, the protocol's form of each data set, and messages that name both
ways to get it.
"""

from __future__ import annotations

import re

import pytest

from prunekit.data import datasets, docs_cloze, files, pydocs
from prunekit.errors import ConfigError


@pytest.fixture(autouse=True)
def no_folder(monkeypatch):
    monkeypatch.delenv("PRUNEKIT_DATA", raising=False)


def grams(paragraphs, n=16):
    words = [p.split() for p in paragraphs]
    return {" ".join(w[i : i + n]) for w in words for i in range(len(w) - n + 1)}


def test_pydocs_parts_share_no_paragraph_and_no_long_run_of_words():
    parts = {split: datasets.texts("pydocs", split) for split in pydocs.SPLITS}
    assert all(len("".join(p)) > 40_000 for p in parts.values()), {
        k: len("".join(p)) for k, p in parts.items()
    }
    for a, b in (("test", "calibration"), ("test", "recovery"), ("calibration", "recovery")):
        assert not set(parts[a]) & set(parts[b])
        assert not grams(parts[a]) & grams(parts[b])


def test_pydocs_holds_prose_only():
    for split in pydocs.SPLITS:
        for paragraph in datasets.texts("pydocs", split):
            assert "\n" not in paragraph
            assert ">>>" not in paragraph
            assert "::=" not in paragraph
            assert not re.search(r"(New|Changed) in version", paragraph)


def test_a_patch_release_that_edits_a_topic_moves_no_other(monkeypatch):
    from pydoc_data import topics

    before = {s: datasets.texts("pydocs", s) for s in pydocs.SPLITS}
    words = "A brand new paragraph that only a later patch release of the language has got."
    changed = {
        **topics.topics,
        "a-new-topic": words,
        "compound": topics.topics["compound"] + "\n\nIt also " + words,
    }
    monkeypatch.setattr(topics, "topics", changed)
    assert set(datasets.texts("pydocs", "calibration")) == set(before["calibration"])
    assert set(datasets.texts("pydocs", "test")) - set(before["test"]) == {"It also " + words}
    assert set(datasets.texts("pydocs", "recovery")) - set(before["recovery"]) == {words}


def test_unknown_split_names_what_there_is():
    with pytest.raises(ConfigError, match="calibration, recovery, test"):
        datasets.texts("pydocs", "tset")
    with pytest.raises(ConfigError, match=r"'tset'.*train, validation, test"):
        datasets.texts("wikitext2", "tset")
    with pytest.raises(ConfigError, match="pydocs, wikitext2"):
        datasets.texts("wikitext3", "test")


def test_without_folder_and_hub_the_error_names_both_ways(tmp_path):
    with pytest.raises(
        ConfigError,
        match=r"no data folder is named, and the hub did not give Salesforce/wikitext.*"
        r"data_root= or PRUNEKIT_DATA",
    ):
        datasets.texts("wikitext2", "test")
    with pytest.raises(ConfigError, match=r"wikitext2/test.txt is not there"):
        datasets.texts("wikitext2", "test", str(tmp_path))
    with pytest.raises(ConfigError, match=r"data_root='.*missing' is not a folder"):
        datasets.texts("wikitext2", "test", str(tmp_path / "missing"))


def test_wikitext_lines_become_the_hubs_rows(tmp_path, monkeypatch):
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "test.txt").write_text(" \n = A Title = \n \n Some prose . \n")
    monkeypatch.setenv("PRUNEKIT_DATA", str(tmp_path))
    rows = datasets.texts("wikitext2", "test")
    assert rows == ["", " = A Title = \n", "", " Some prose . \n"]
    assert datasets.document(rows) == "\n\n = A Title = \n\n\n\n\n Some prose . \n"


def test_local_c4_keeps_training_and_validation_apart(tmp_path):
    (tmp_path / "c4").mkdir()
    (tmp_path / "c4" / "any.jsonl").write_text(
        "".join(f'{{"text": "page {i}"}}\n' for i in range(9))
    )
    train, validation = (datasets.texts("c4", s, str(tmp_path)) for s in ("train", "validation"))
    assert len(train) == 6
    assert len(validation) == 3
    assert not set(train) & set(validation)


def test_shared_folder_gives_every_set_in_the_form_of_the_protocol(shared):
    root = str(shared / "data")
    wiki = datasets.texts("wikitext2", "test", root)
    assert len(wiki) == 4358
    assert wiki[0] == ""
    assert wiki[1] == " = Robert Boulter = \n"
    assert all(row == "" or row.endswith("\n") for row in wiki)
    ptb = datasets.texts("ptb", "validation", root)
    assert len(ptb) == 3370
    assert all(row == row.strip() for row in ptb)
    assert (
        len(datasets.texts("alpaca", "train", root))
        == len(datasets.records("alpaca", "train", root))
        == 7418
    )
    assert set(datasets.records("alpaca", "train", root)[0]) == {"instruction", "input", "output"}
    assert len(datasets.texts("dailydialog", "train", root)) == 5909
    assert len(datasets.texts("bookcorpus", "train", root)) > 8000


def test_bad_jsonl_names_the_file(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\nnot json\n')
    with pytest.raises(ConfigError, match=r"bad.jsonl"):
        files.read(tmp_path / "bad.jsonl")


def test_cloze_items_are_fair_and_fixed():
    items = docs_cloze.items()
    assert items == docs_cloze.items()
    assert len(items) > 300
    for item in items:
        assert len(item["choices"]) == len(set(item["choices"])) == 4
        assert {len(c.split()) for c in item["choices"]} == {docs_cloze.CONTINUATION}
    share = [sum(i["label"] == k for i in items) / len(items) for k in range(4)]
    assert all(0.18 < s < 0.32 for s in share), share
    test = " ".join(datasets.texts("pydocs", "test"))
    assert all(i["context"] + i["choices"][i["label"]] in test for i in items)


def test_an_alpaca_record_may_lack_its_input(tmp_path):
    (tmp_path / "alpaca").mkdir()
    rows = '{"instruction": "Add.", "output": "3"}\n'
    rows += '{"instruction": "Add.", "input": "1 2", "output": "3"}\n'
    (tmp_path / "alpaca" / "train.jsonl").write_text(rows)
    assert datasets.texts("alpaca", "train", str(tmp_path)) == ["Add.\n3", "Add.\n1 2\n3"]
