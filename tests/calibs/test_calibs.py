"""Calibration draws: LLM-Pruner's rule, the peers' tokens, private seeds, messages."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from prunekit.data import datasets
from prunekit.data.crops import crops
from prunekit.errors import ConfigError
from prunekit.models.tiny import byte_tokenizer
from prunekit.registry import calibs

TOKENIZER = byte_tokenizer()
ROWS = [f"row {i:02d}: " + "abcdefgh" * (i % 7) for i in range(40)]


def draw(**options):
    return crops(
        ROWS, TOKENIZER, **{"samples": 10, "length": 24, "seed": 0, "join": False, **options}
    )


@pytest.mark.parametrize("name", ["crop", "text"])
def test_every_draw_has_the_asked_shape_and_leaves_the_global_generator_alone(name, tmp_path):
    file = tmp_path / "some.txt"
    file.write_text("\n".join(ROWS))
    node = {"name": name, "samples": 3, "length": 16} | (
        {"path": str(file), "take": "random"} if name == "text" else {}
    )
    state = torch.get_rng_state()
    tokens = calibs.build(node)(TOKENIZER)
    assert tokens.shape == (3, 16)
    assert tokens.dtype == torch.int64
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(tokens, calibs.build(node)(TOKENIZER))
    assert not torch.equal(tokens, calibs.build(node | {"seed": 7})(TOKENIZER))


def test_each_sample_is_a_stretch_of_one_row_that_is_used_once():
    texts = [TOKENIZER.decode(t, skip_special_tokens=True) for t in draw()]
    homes = [[i for i, row in enumerate(ROWS) if text in row] for text in texts]
    assert all(homes), texts
    rows = [row for row in ROWS if len(TOKENIZER(row).input_ids) >= 24]
    everything = draw(samples=len(rows))
    assert len(everything) == len(rows)  # only possible if no row is drawn twice


def test_rows_that_are_too_short_are_named_and_joined_on_request():
    with pytest.raises(
        ConfigError, match=r"10 samples of 70 tokens, but only 0 of the 40 rows .*join=true"
    ):
        draw(length=70)
    joined = draw(length=70, join=True, glue=" ")
    assert joined.shape == (10, 70)
    whole = " ".join(ROWS)
    assert all(TOKENIZER.decode(t, skip_special_tokens=True) in whole for t in joined)
    with pytest.raises(ConfigError, match="only 0 of the 40"):
        draw(length=100_000, join=True)


@pytest.mark.parametrize(("samples", "said"), [(20, False), (24, True)])
def test_more_tokens_than_the_text_has_are_said(samples, said, caplog):
    """The 40 rows and what joins them are 1,279 bytes, a token each, and one begins the text."""
    draw(samples=samples, length=60, join=True, glue=" ")
    assert ("asks for 1440 tokens of a text that has 1280" in caplog.text) == said
    assert ("calib.samples=21 at most" in caplog.text) == said
    caplog.clear()
    draw(samples=24, length=20, join=False)  # no row is used twice
    assert not caplog.text


def test_calibration_reads_the_part_that_is_kept_for_it():
    tokens = calibs.build({"name": "crop", "samples": 5, "length": 32})(TOKENIZER)
    part = datasets.document(datasets.texts("pydocs", "calibration"))
    assert all(
        TOKENIZER.decode(t, skip_special_tokens=True).strip("\ufffd") in part for t in tokens
    )


def test_text_takes_the_first_tokens_of_a_text_or_jsonl_file(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo three")
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n{"body": "two three"}\n')
    expected = torch.tensor(
        TOKENIZER("one\n\ntwo three", add_special_tokens=False).input_ids[:12]
    ).view(3, 4)
    for node in (
        {"path": str(tmp_path / "a.txt")},
        {"path": str(tmp_path / "a.jsonl"), "field": "body"},
    ):
        assert torch.equal(
            calibs.build({"name": "text", "samples": 3, "length": 4, **node})(TOKENIZER), expected
        )


def test_text_messages(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n')
    node = {"name": "text", "path": str(tmp_path / "a.jsonl")}
    with pytest.raises(ConfigError, match=r"field 'text'.*body"):
        calibs.build(node)(TOKENIZER)
    with pytest.raises(ConfigError, match=r"has 3 tokens, fewer than 2 samples of 64; .* are 0 of"):
        calibs.build({**node, "field": "body", "samples": 2})(TOKENIZER)
    with pytest.raises(ConfigError, match="is not a file"):
        calibs.build({"name": "text", "path": str(tmp_path / "missing.txt")})
    with pytest.raises(ConfigError, match="needs path"):
        calibs.build({"name": "text"})
    with pytest.raises(ConfigError, match="greater than 0"):
        calibs.build({"name": "crop", "samples": 0})


@pytest.mark.parametrize(
    "options",
    [
        {"dataset": "bookcorpus", "glue": " "},
        {"dataset": "c4", "join": False},
        {"dataset": "wikitext2", "glue": "\n"},
        {"dataset": "dailydialog", "join": False},
        {"dataset": "alpaca"},
    ],
    ids=lambda o: o["dataset"],
)
def test_shared_sets_give_calibration_tokens(shared, options):
    tokens = calibs.build(
        {"name": "crop", "length": 128, "data_root": str(shared / "data"), **options}
    )(TOKENIZER)
    assert tokens.shape == (10, 128)


@pytest.mark.slow
@pytest.mark.parametrize(("samples", "length"), [(10, 64), (128, 128)])
def test_first_tokens_are_the_peers_calibration(shared, smollm2, samples, length):
    spec = importlib.util.spec_from_file_location("peer_ppl", shared / "tools" / "peer_ppl.py")
    peer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peer)
    path = str(shared / "data" / "wikitext2_tokenised" / "validation.txt")
    ours = calibs.build({"name": "text", "path": path, "samples": samples, "length": length})(
        smollm2[1]
    )
    assert torch.equal(ours, peer.calibration(smollm2[1], samples, length))


def test_a_stretch_may_begin_wherever_it_still_fits():
    rows = [chr(ord("a") + i) * 2 + "xyz" for i in range(20)]  # six tokens with the first one
    drawn = crops(rows, byte_tokenizer(), samples=20, length=5, seed=0, join=False)
    begins = [row[0] == byte_tokenizer().bos_token_id for row in drawn.tolist()]
    assert 0 < sum(begins) < 20
