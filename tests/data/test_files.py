"""Text that a user hands over: read as it is, or refused with file, line and what was expected."""

from __future__ import annotations

import json
import os

import pytest

from prunekit.data.datasets import evaluation_text
from prunekit.data.files import data_folder, existing_file, read
from prunekit.data.training_examples import file_text
from prunekit.errors import ConfigError

GOOD = json.dumps({"text": "fine"}).encode() + b"\n"
BAD = {
    b"": "holds no text",
    b"\n\n": "holds no text",
    b'{"text": ""}\n': "holds no text",
    b"\xff\xfet\x00": "is UTF-16; text in UTF-8",
    b"\x7fELF\x00\x01": "line 1, holds a NUL byte",
    GOOD + b"caf\xe9\n": r"line 2: byte 0xe9 is not UTF-8",
    GOOD + b"\n[1, 2]\n": "line 3: an object is expected, found a list",
    GOOD + b"3\n": "line 2: an object is expected, found a number",
    GOOD + b"null\n": "line 2: an object is expected, found null",
    GOOD + b"{\n": "line 2, is not JSON",
    GOOD + b"[" * 10**5 + b"\n": "line 2, is not JSON",
    GOOD + b'{"a": 1, "b": 2}\n': "line 2: the record has no field 'text'; it has: a, b",
    GOOD + b'{"text": 5}\n': "line 2: field 'text' must be text, found a number",
    GOOD + b'{"text": null}\n': "line 2: field 'text' must be text, found null",
    GOOD + b'{"text": ["a"]}\n': "line 2: field 'text' must be text, found a list",
    GOOD + b'{"text": {"text": "a"}}\n': "line 2: field 'text' must be text, found an object",
    GOOD + b'{"text": "\\ud800"}\n': "line 2: .* is half a character",
}


@pytest.mark.parametrize("content", BAD, ids=lambda c: repr(c[-20:]))
def test_what_is_no_record_is_named_with_its_line(tmp_path, content):
    path = tmp_path / "t.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=BAD[content]) as refused:
        read(path)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"\xff\xfet\x00", b"a\0b", b"one\ncaf\xe9\n"])
def test_plain_text_is_utf_8(tmp_path, content):
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=r"t\.txt"):
        read(tmp_path / "t.txt")


def test_json_is_not_read_as_plain_text(tmp_path):
    (tmp_path / "t.json").write_bytes(GOOD)
    with pytest.raises(ConfigError, match=r"one record a line is needed, under a name"):
        existing_file(str(tmp_path / "t.json"))
    (tmp_path / "T.JSONL").write_bytes(GOOD)
    assert read(tmp_path / "T.JSONL") == [{"text": "fine"}]
    assert evaluation_text(None, None, str(tmp_path / "T.JSONL")) == "fine"
    assert file_text(str(tmp_path / "T.JSONL")) == "fine"


def test_text_comes_back_as_it_is(tmp_path):
    (tmp_path / "t.txt").write_bytes("\ufeffone\r\n\u00e9\n\nlast".encode())
    assert [r["text"] for r in read(tmp_path / "t.txt")] == ["one\r\n", "\u00e9\n", "\n", "last"]


def test_records_may_have_other_fields_and_leave_optional_ones_out(tmp_path):
    path = tmp_path / "t.jsonl"
    rows = [
        {"instruction": "a", "output": "b", "x": 1},
        {"instruction": "", "output": "", "input": None},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert read(path, ("instruction", "output"), optional=("input",)) == rows
    path.write_text(json.dumps(rows[0] | {"input": 3}))
    with pytest.raises(ConfigError, match="line 1: field 'input' must be text, found a number"):
        read(path, ("instruction", "output"), optional=("input",))


def test_lists_hold_texts(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"dialog": ["a", "b"]}\n{"dialog": ["a", 1]}')
    with pytest.raises(ConfigError, match="line 2: field 'dialog' must be a list of texts"):
        read(path, (), lists=("dialog",))


def test_fields_are_of_records(tmp_path):
    (tmp_path / "t.txt").write_text("a")
    with pytest.raises(ConfigError, match="plain text, whose lines have no field but 'text'"):
        read(tmp_path / "t.txt", ("body",))


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (
        str(tmp_path / "fifo"),
        str(tmp_path),
        "/no/such",
        "a\0b",
        "~nobody-here/x",
        "x" * 5000,
    ):
        with pytest.raises(ConfigError, match="is not a file"):
            existing_file(path)
        with pytest.raises(ConfigError, match="is not a folder"):
            data_folder(path if path != str(tmp_path) else str(tmp_path / "fifo"))
