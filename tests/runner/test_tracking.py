from __future__ import annotations

import logging
import os
import subprocess
import sys
import time

import pytest

from prunekit.runner import tracking
from prunekit.runner.tracking import Track, open_track


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    """Neither the developer's login nor the job's environment may reach a test."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv(
        "WANDB_BASE_URL", "http://127.0.0.1:9"
    )  # nothing listens on the discard port
    monkeypatch.setattr(tracking, "INIT_SECONDS", 3)


def records(folder) -> list:
    """What a run's file holds once it is whole: `finish` may return some milliseconds before the
    background process has written it.
    """
    for _ in range(100):
        found = read(folder)
        if any(r.HasField("exit") for r in found):
            return found
        time.sleep(0.05)
    raise AssertionError(f"no exit record in {folder}")


def read(folder) -> list:
    """What a run's file on disk holds: a LevelDB log (7 bytes of header, then blocks of 32 KiB) of
    protobuf records.
    """
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    raw, at, part, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(raw):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768  # no header fits into the rest of this block
            continue
        size, kind = int.from_bytes(raw[at + 4 : at + 6], "little"), raw[at + 6]
        part += raw[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            found.append(wandb_internal_pb2.Record.FromString(part))
            part = b""
    return found


def logged(folder) -> set[str]:
    items = (i for r in records(folder) if r.HasField("history") for i in r.history.item)
    return {i.key or i.nested_key[0] for i in items}


def use(session: Track, folder) -> None:
    (folder / "pruning.json").write_text("{}")
    session.log({"dense/ppl": 3.0})
    session.log({"recovery/loss": 2.0}, step=5)
    session.table("kept", ["layer", "neurons"], [[0, 12], [1, 7]])
    session.artifact("checkpoint metadata", [folder / "pruning.json"])


def test_offline_leaves_a_whole_run_on_disk(tmp_path, capfd):
    with open_track(
        "offline", config={"seed": 1}, folder=tmp_path, tags=["a"], name="n", group="g"
    ) as session:
        use(session, tmp_path)
    assert {"dense/ppl", "recovery/loss", "kept"} <= logged(tmp_path)
    kinds = {r.WhichOneof("record_type") for r in records(tmp_path)}
    assert {"run", "history", "exit"} <= kinds
    (run,) = (r.run for r in records(tmp_path) if r.HasField("run"))
    assert (run.display_name, run.run_group, list(run.tags), run.project) == (
        "n",
        "g",
        ["a"],
        "prunekit",
    )
    assert "seed" in {u.key for u in run.config.update}
    assert capfd.readouterr() == ("", "")


def test_an_error_inside_closes_the_session_as_failed_and_goes_on_up(tmp_path):
    with pytest.raises(KeyError), open_track("offline", config={}, folder=tmp_path):
        raise KeyError
    (code,) = [r.exit.exit_code for r in records(tmp_path) if r.HasField("exit")]
    assert code == 1


@pytest.mark.parametrize("key", [None, "a" * 40], ids=["nobody logged in", "server down"])
def test_no_login_or_no_server_goes_on_offline_with_a_warning(tmp_path, monkeypatch, caplog, key):
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    with (
        caplog.at_level(logging.WARNING, logger="prunekit"),
        open_track("wandb", config={}, folder=tmp_path) as session,
    ):
        use(session, tmp_path)
    assert "going on offline" in caplog.text
    assert {"dense/ppl", "recovery/loss"} <= logged(tmp_path)


KILLED = """
import logging, psutil, sys
from prunekit.runner.tracking import open_track
logging.basicConfig()
with open_track("offline", config={}, folder=sys.argv[1]) as session:
    children = psutil.Process().children(recursive=True)
    assert children
    for child in children:
        child.kill()
    psutil.wait_procs(children)
    for step in range(3):
        session.log({"loss": 1.0})
    session.artifact("a", [])
sys.stdout.write("the result")
"""


def test_a_killed_background_process_loses_no_result(tmp_path):
    # In a process of its own: wandb shares one background process among all runs of a process.
    alone = {k: v for k, v in os.environ.items() if k != "WANDB_SERVICE"}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        env=alone,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "the result" in done.stdout
    assert "wandb log" in done.stderr
    assert done.returncode == 0, done.stderr


def test_silent_and_other_processes_write_nothing(tmp_path, monkeypatch):
    with open_track("silent", config={}, folder=tmp_path) as session:
        use(session, tmp_path)
    monkeypatch.setenv("RANK", "1")
    with open_track("offline", config={}, folder=tmp_path) as session:
        use(session, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["pruning.json"]


def test_unknown_mode_names_what_there_is(tmp_path):
    with (
        pytest.raises(ValueError, match="offline, wandb, silent"),
        open_track("online", config={}, folder=tmp_path),
    ):
        pass
