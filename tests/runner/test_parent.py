"""A worker ends soon after the process that announced itself, however that one ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from paths import ROOT

WORKER = "from prunekit.runner import parent; parent.follow(); import time; time.sleep(60)"
# What a shell starts in the background ignores SIGINT, and so would its children.
PARENT = f"""
import signal, subprocess, sys, time
from prunekit.runner import parent
signal.signal(signal.SIGINT, signal.default_int_handler)
parent.announce()
worker = subprocess.Popen([sys.executable, "-c", {WORKER!r}], start_new_session=True)
print(worker.pid, flush=True)
time.sleep(60)
"""


def started(env=None) -> tuple[subprocess.Popen, psutil.Process]:
    env = os.environ | {"PYTHONPATH": str(ROOT)} | (env or {})
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT], env=env, stdout=subprocess.PIPE, text=True
    )
    worker = psutil.Process(int(process.stdout.readline()))
    while b"time.sleep".decode() in "".join(worker.cmdline()) and worker.num_threads() < 2:
        if "SLURM_JOB_ID" in env:
            break
        time.sleep(0.05)
    return process, worker


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_worker_ends_with_its_parent(how):
    process, worker = started()
    process.send_signal(how)
    process.wait(10)
    gone, _ = psutil.wait_procs([worker], timeout=10)
    if not gone:
        worker.kill()
    assert gone


def test_a_job_of_a_cluster_goes_on():
    process, worker = started({"SLURM_JOB_ID": "1"})
    process.kill()
    process.wait(10)
    try:
        gone, _ = psutil.wait_procs([worker], timeout=2)
        assert not gone
    finally:
        worker.kill()
