"""What needs no model answers without loading what models need."""

from __future__ import annotations

import subprocess
import sys

import pytest
from paths import ROOT

from prunekit.cli.main import COMMANDS, WITH_FLAGS

PROBE = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from prunekit.cli.main import main
status = main(sys.argv[1:])
print("loaded:", *({{"torch", "transformers"}} & sys.modules.keys()), file=sys.stderr)
sys.exit(status)
"""


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["--help"], 0, "prunekit list"),
        *[([c, "--help"], 0, f"prunekit {c}") for c in COMMANDS if c not in WITH_FLAGS],
        (["list"], 0, "block_influence"),
        (["list", "criterion"], 0, "param_first"),
        (["ratio.taget=0.2"], 2, "possible: target"),
        (["criterion=tailor"], 2, "taylor"),
        (["lst"], 2, "no command 'lst'"),
        (["--cfg", "job"], 0, "criterion:\n  name: taylor"),
        (["--cfg", "job", "model=tiny_llama", "criterion=l2"], 0, "name: l2"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_no_torch_for_what_needs_no_model(words, status, says, tmp_path):
    asked = [sys.executable, "-c", PROBE, *words]
    done = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert says in done.stdout + done.stderr
    assert done.stderr.splitlines()[-1] == "loaded:"
    assert not list(tmp_path.iterdir())


def test_importing_prunekit_loads_no_torch():
    code = "import sys, prunekit; print(*({'torch', 'transformers'} & sys.modules.keys()))"
    asked = [sys.executable, "-c", code]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
