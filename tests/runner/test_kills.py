"""SIGKILL at random moments of a run with recovery and of sweeps: the same command goes on, does
nothing finished again, and comes to the bits of an undisturbed one.

`PRUNEKIT_KILLS=100` kills that often; which moments is seeded, what runs in them is up to the
machine. `pytest -s` shows each.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from paths import ROOT

KILLS = int(os.environ.get("PRUNEKIT_KILLS", "6"))
EACH = 3
"""Kills of one command in a row; a restart that finishes before its moment is not killed."""
JOBS = "jobs/[!.]*"
WORDS = ["model=tiny_llama", "exclude=none", "eval=quick", "track=silent", "calib.samples=4"]
WORDS += ["calib.length=16", "recovery=lora_text", "recovery.max_steps=2"]
WORDS += ["recovery.max_length=32"]
SWEEP = ["-m", *WORDS, "ratio.target=0.1,0.2", "hydra.sweep.dir=jobs"]
WAYS = {
    "run": [*WORDS, "hydra.run.dir=jobs/one"],
    "submitit_local": [*SWEEP, "hydra/launcher=submitit_local"],
    "joblib": [*SWEEP, "hydra/launcher=joblib"],
    "basic": SWEEP,
    "training": [
        *WORDS,
        "recovery.max_steps=25",
        "recovery.save_every=1",
        "hydra.run.dir=jobs/one",
    ],
}


def start(folder: Path, way: str) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env |= {"PRUNEKIT_CACHE": str(folder / "cache")}
    with (folder / "out.txt").open("a") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "prunekit", *WAYS[way]],
            cwd=folder,
            env=env,
            stdout=out,
            stderr=subprocess.STDOUT,
            text=True,
        )


def logged(job: Path) -> list[str]:
    file = job / "run.log"
    return file.read_text().splitlines() if file.exists() else []


def begun(folder: Path) -> int:
    """Lines that the jobs logged so far."""
    return sum(len(logged(job)) for job in folder.glob(JOBS))


@dataclass
class Seen:
    """What a job had finished when it was killed: its stages, its result."""

    job: Path
    stages: set[str]
    result: int | None
    lines: int

    @classmethod
    def now(cls, job: Path) -> Seen:
        names = {p.stem for p in job.glob("stages/*/*.entry")}
        for model in ("pruned", "recovered"):
            if names >= {f"{model}-facts", f"{model}-tensors"}:
                names.add(model)
        file = job / "result.json"
        result = file.stat().st_ino if file.exists() else None
        return cls(job, names, result, len(logged(job)))

    def done_again(self) -> list[str]:
        """What was finished then, and begun once more since."""
        since = [line.partition(" prunekit: ")[2] for line in logged(self.job)[self.lines :]]
        if self.result is not None:
            return [] if (self.job / "result.json").stat().st_ino == self.result else since
        says = {"pruned": ["pruning", "loading the model"], "recovered": ["recovering"]}
        for name in self.stages:
            when, _, evaluation = name.partition("-")
            says.setdefault(name, [f"{when}: measuring {evaluation}"])
        return [line for name in self.stages for line in says[name] if line in since]


def killed(process: subprocess.Popen[str], folder: Path, after: float, who: float) -> bool:
    """Whether the command, or a process that it started, was still there to be killed `after`
    seconds from its first line; `who` below 0.5 is the command itself.
    """
    lines = begun(folder)
    while begun(folder) == lines and process.poll() is None:
        time.sleep(0.01)
    with suppress(subprocess.TimeoutExpired):
        process.wait(after)
    if process.poll() is not None:
        return False
    top = psutil.Process(process.pid)
    family = [p for p in top.children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
    target = top if who < 0.5 or not family else family[int((2 * who - 1) * len(family))]
    stages = {job.name: (job / "stage.txt") for job in folder.glob(JOBS)}
    doing = {name: file.read_text() if file.exists() else "" for name, file in stages.items()}
    print(f"killed {'itself' if target is top else 'a worker'} in {doing}", flush=True)  # noqa: T201
    with suppress(psutil.NoSuchProcess):
        target.kill()
    process.wait(300)
    return True


def bits(folder: Path) -> dict[str, object]:
    """Numbers and files of every job."""
    found: dict[str, object] = {}
    for job in sorted(folder.glob(JOBS)):
        record = json.loads((job / "result.json").read_text())
        keys = ("results", "importance", "kept")
        found[job.name] = {k: record[k] for k in keys} | {"stages": sorted(record["stages"])}
        for file in (job / "checkpoint").iterdir():
            if file.name != "pruning.json":  # holds the job's folder
                found[f"{job.name}/{file.name}"] = file.read_bytes()
    return found


def finished_run(folder: Path) -> bool:
    """Whether a single run is through: asked for again, it would run again, as a sweep's job would
    not.
    """
    return (folder / "jobs" / "one" / "result.json").exists()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """way -> the bits, and the seconds from its first line to its end; sweeps share one."""
    done: dict[str, tuple[dict[str, object], float]] = {}

    def of(way: str) -> tuple[dict[str, object], float]:
        way = way if way in ("run", "training") else "basic"
        if way not in done:
            folder = tmp_path_factory.mktemp(way)
            process = start(folder, way)
            while not begun(folder) and process.poll() is None:
                time.sleep(0.01)
            since = time.monotonic()
            assert process.wait(300) == 0, (folder / "out.txt").read_text()
            done[way] = bits(folder), time.monotonic() - since
        return done[way]

    return of


@pytest.mark.slow
@pytest.mark.parametrize("number", range(-(-KILLS // EACH)))
def test_the_same_command_goes_on_to_the_same_bits(number, tmp_path, undisturbed):
    way = list(WAYS)[number % (len(WAYS) - 1)]
    expected, seconds = undisturbed(way)
    draw = random.Random(f"{way}{number}")
    seen = []
    for _ in range(EACH):
        if finished_run(tmp_path):
            break
        process = start(tmp_path, way)
        if not killed(process, tmp_path, draw.uniform(0, 0.6 * seconds), draw.random()):
            break
        seen += [Seen.now(job) for job in tmp_path.glob(JOBS) if (job / "run.log").exists()]
    if not finished_run(tmp_path):
        assert start(tmp_path, way).wait(300) == 0, (tmp_path / "out.txt").read_text()
    found = bits(tmp_path)
    assert found.keys() == expected.keys()
    assert not [name for name in found if found[name] != expected[name]]
    assert not [(s.job.name, s.done_again()) for s in seen if s.done_again()]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(-(-KILLS // EACH)))
def test_a_training_goes_on_at_the_step_where_it_was(number, tmp_path, undisturbed):
    expected, _ = undisturbed("training")
    process = start(tmp_path, "training")
    steps, written = random.Random(number).randrange(1, 24), set()
    while len(written) < steps and process.poll() is None:
        for file in tmp_path.glob("jobs/one/stages/*/recovered-unfinished-*.entry"):
            with suppress(FileNotFoundError):
                written.add(file.stat().st_mtime_ns)
        time.sleep(0.002)
    process.kill()
    process.wait(300)
    assert not finished_run(tmp_path)
    assert start(tmp_path, "training").wait(300) == 0, (tmp_path / "out.txt").read_text()
    gone_on = [line for line in logged(tmp_path / "jobs" / "one") if "goes on from step" in line]
    assert len(gone_on) == 1
    print(gone_on[0], flush=True)  # noqa: T201
    assert int(gone_on[0].split()[-1]) >= steps
    assert bits(tmp_path) == expected
