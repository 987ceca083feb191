"""What a wheel holds: it runs where there is no checkout, with every YAML and every paper's
numbers.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def read_at_run_time(top: Path) -> set[str]:
    """The files that code finds by their place."""
    found = [*(top / "conf").rglob("*.yaml"), *(top / "experiments").rglob("paper.json")]
    return {p.relative_to(top).as_posix() for p in found}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The files of a wheel, not zipped."""
    pytest.importorskip("setuptools")
    if not (ROOT / "setup.py").is_file():
        pytest.skip("not a checkout")
    out = tmp_path_factory.mktemp("wheel")
    words = [
        "setup.py",
        "-q",
        "egg_info",
        "--egg-base",
        str(out),
        "build_py",
        "--build-lib",
        str(out),
    ]
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True)
    return out


def test_a_wheel_holds_the_configuration_the_papers_numbers_and_the_reports_files(built):
    assert read_at_run_time(built / "prunekit") == read_at_run_time(ROOT)
    assert {p.name for p in (built / "prunekit" / "report").glob("page.*")} == {
        "page.py",
        "page.html",
        "page.css",
        "page.js",
    }
    assert (built / "hydra_plugins" / "prunekit_sweeper" / "sweeper.py").is_file()
    assert not (built / "tests").exists()


def test_it_plans_outside_of_a_checkout(built):
    env = os.environ | {"PYTHONPATH": str(built), "COLUMNS": "120"}
    asked = [sys.executable, "-m", "prunekit", "plan", "model=tiny_llama", "exclude=none"]
    done = subprocess.run(asked, cwd=built, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "parameters" in done.stdout
    where = [
        sys.executable,
        "-c",
        "from prunekit.cli.main import conf_dir; from prunekit.report.paper import folder; "
        "print(conf_dir(), folder())",
    ]
    found = subprocess.run(
        where, cwd=built, env=env, capture_output=True, text=True, check=True
    ).stdout.split()
    assert [Path(p).resolve() for p in found] == [
        (built / "prunekit" / n).resolve() for n in ("conf", "experiments")
    ]
