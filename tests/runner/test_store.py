"""Entries on disk: what is damaged is thrown away with one line, and what was stored comes back."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from prunekit.runner import store
from prunekit.runner.store import Entry


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNEKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "results"


def scores(key="0" * 32) -> Entry:
    return Entry.of_scores(key)


def numbers(key="0" * 32) -> Entry:
    return Entry.of_numbers(key, "x")


VALUE = {"b": torch.tensor([1.5, float("inf")]), "a": torch.arange(3.0), "c": torch.ones(2, 2)}


def test_scores_keep_their_order_and_their_bits():
    read = store.decode_scores(store.encode_scores(VALUE))
    assert list(read) == list(VALUE)
    assert all(torch.equal(read[n], VALUE[n]) for n in VALUE)


def test_what_is_stored_is_not_computed_again():
    assert store.remember(numbers(), lambda: {"x": 1.0}) == ({"x": 1.0}, False)
    assert store.remember(numbers(), lambda: {"x": 2.0}) == ({"x": 1.0}, True)
    assert store.remember(numbers("1" * 32), lambda: {"x": 2.0}) == ({"x": 2.0}, False)


def damage(path, how: str) -> None:
    content = path.read_bytes()
    first, _, rest = content.partition(b"\n")
    path.unlink()
    if how == "folder":
        (path / "sub").mkdir(parents=True)
    elif how == "fifo":
        os.mkfifo(path)
    elif how == "dangling link":
        path.symlink_to(path.parent / "nowhere")
    elif how == "another entry":
        path.write_bytes(content.replace(b"0" * 32, b"1" * 32))
    else:
        changed = bytearray(content)
        changed[-1] ^= 1
        path.write_bytes(
            {
                "empty": b"",
                "truncated": content[:-3],
                "one bit": bytes(changed),
                "one byte more": content + b" ",
                "no header": rest,
                "json alone": b"[]",
                "other header": b"\xff" * 300,
                "right sum, no value": b" ".join([*first.split()[:2], store.checksum(b"[1")])
                + b"\n[1",
            }[how]
        )


HOW = "folder;fifo;dangling link;another entry;empty;truncated;one bit;one byte more;no header"
HOW += ";json alone;other header;right sum, no value"


@pytest.mark.parametrize("how", HOW.split(";"))
@pytest.mark.parametrize("make", [scores, numbers])
def test_a_damaged_entry_is_thrown_away_with_one_line_and_computed_anew(make, how, caplog):
    entry, value = make(), VALUE if make is scores else {"x": 0.1}
    store.remember(entry, lambda: value)
    damage(entry.path, how)
    found, stored = store.remember(entry, lambda: value)
    assert (found is value, stored) == (True, False)
    assert len(caplog.messages) == 1
    assert str(entry.path) in caplog.messages[0]
    found, stored = store.remember(entry, lambda: pytest.fail("it is stored again"))
    assert stored
    assert list(found) == list(value)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_something_else_in_the_place_of_a_lock_makes_way(make):
    entry = numbers()
    entry.path.parent.mkdir(parents=True)
    make(entry.path.with_suffix(".lock"))
    assert store.remember(entry, lambda: {"x": 1.0}) == ({"x": 1.0}, False)
    assert store.remember(entry, lambda: {"x": 2.0}) == ({"x": 1.0}, True)


def test_a_store_that_cannot_be_written_costs_time_and_no_run(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PRUNEKIT_CACHE", str(tmp_path / "file"))
    assert store.remember(numbers(), lambda: {"x": 1.0}) == ({"x": 1.0}, False)
    assert any("cannot be locked" in m for m in caplog.messages)
    assert any("dense/x is not stored" in m for m in caplog.messages)


def test_a_full_disk_leaves_no_half_entry(monkeypatch, folder, caplog):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    assert store.remember(numbers(), lambda: {"x": 1.0}) == ({"x": 1.0}, False)
    assert "No space left" in caplog.text
    assert not list(folder.rglob("*.entry*"))


def test_the_store_is_bounded_and_drops_what_was_unused_for_longest(tmp_path):
    for i in range(4):
        path = tmp_path / f"{i}.entry"
        path.write_text("x" * 100)
        os.utime(path, (i, i))
    (tmp_path / "left.entry.77.tmp").write_text("x" * 100)
    os.utime(tmp_path / "left.entry.77.tmp", (0, 0))
    store.keep_within(tmp_path, 250)
    assert {p.name for p in tmp_path.iterdir()} == {"2.entry", "3.entry"}


def test_how_much_is_kept_is_the_users_to_say(folder, monkeypatch):
    def left_after(key):
        store.remember(numbers(key * 32), lambda: {"x": 1.0})
        return len(list(folder.rglob("*.entry")))

    assert [left_after(key) for key in "012"] == [1, 2, 3]
    size = numbers("2" * 32).path.stat().st_size
    monkeypatch.setenv("PRUNEKIT_CACHE_GIB", f"{1.5 * size / 2**30:.12f}")
    assert left_after("3") == 1


REMEMBER = """
import os, time
from prunekit.runner import store

def slow():
    time.sleep(0.5)
    return {"x": float(os.getpid())}

print(store.remember(store.Entry.of_numbers("0" * 32, "x"), slow)[1])
"""


def test_processes_that_want_the_same_compute_it_once(tmp_path):
    environment = {**os.environ, "PRUNEKIT_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", REMEMBER]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) for _ in range(2)]
    used = [process.communicate(timeout=120)[0].decode().strip() == "True" for process in both]
    assert sorted(used) == [False, True]
