"""A job on a disk that is full, or that cannot be written at all: a real file system of a few
kilobytes, in a mount namespace of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from paths import ROOT

INSIDE = """
mount -t tmpfs -o size=$SIZE tmpfs jobs || exit 99
test -z "$MODE" || mount -o remount,$MODE jobs || exit 99
"$@"; status=$?
find jobs -type f -size +0 | sed 's/^/LEFT /'
exit $status
"""


def run_inside(folder, size: str, mode: str = "") -> tuple[int, str]:
    (folder / "jobs").mkdir()
    words = ["model=tiny_llama", "exclude=none", "eval=quick", "track=silent"]
    words += ["hydra.run.dir=jobs/one", "calib.samples=4", "calib.length=16"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "SIZE": size, "MODE": mode}
    env |= {"PRUNEKIT_CACHE": str(folder / "cache")}
    names = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", INSIDE, "sh"]
    done = subprocess.run(
        [*names, sys.executable, "-m", "prunekit", *words],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode == 99 or "unshare" in done.stdout.splitlines()[:1]:
        pytest.skip("needs user namespaces that may mount")
    return done.returncode, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("size", ["8k", "64k", "300k"])
def test_a_full_disk_ends_the_job_with_a_message(tmp_path, size):
    status, out = run_inside(tmp_path, size)
    assert status in (1, 2), out
    assert "Traceback" not in out, out
    assert "cannot be written: No space left on device" in out
    left = [line.removeprefix("LEFT jobs/") for line in out.splitlines() if line[:5] == "LEFT "]
    assert not [name for name in left if "part" in name or name.endswith(".tmp")], left
    assert not [name for name in left if "checkpoint" in name or "result.json" in name], left


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_ends_the_job_with_a_message(tmp_path):
    status, out = run_inside(tmp_path, "64k", "ro")
    assert status == 2, out
    assert "Traceback" not in out, out
    assert "cannot be written: Read-only file system" in out
