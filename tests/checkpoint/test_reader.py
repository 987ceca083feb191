"""What asks for shapes only opens no weights; what loads them reads nothing that `pruning.json`
does not list.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import llama, uneven
from safetensors.torch import save_file

from prunekit.checkpoint import load, outline, save
from prunekit.checkpoint.integrity import CheckpointError
from prunekit.cli import plan
from prunekit.cli.compose import composed
from prunekit.inventory import command as groups
from prunekit.runner import preflight

OPENED: list[str] = []


def note_opened(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and str(args[0]).endswith(".safetensors"):
        OPENED.append(str(args[0]))


sys.addaudithook(note_opened)


@pytest.fixture(params=["plain", "packed"])
def unreadable(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A checkpoint whose every weight file is empty, so that no library reads one, and that no
    Python code opens.
    """
    folder = save(uneven(llama()), None, tmp_path / "out", packed=request.param == "packed")
    for file in folder.glob("*.safetensors"):
        file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load(folder)
    assert OPENED
    OPENED.clear()
    yield folder
    assert not OPENED


def test_an_outline_has_the_shapes_and_opens_no_weights(unreadable: Path) -> None:
    shapes = {name: p.shape for name, p in uneven(llama()).named_parameters()}
    found = outline(unreadable)
    assert all(p.is_meta for p in found.parameters())
    assert {name: p.shape for name, p in found.named_parameters()} == shapes


def test_plan_groups_and_preflight_open_no_weights(
    unreadable: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["model=hf", f"model.path={unreadable}", "exclude=none", "track=silent"]
    assert groups.main(words) == 0
    assert "neurons" in capsys.readouterr().out
    words += ["pruner.kinds=[neurons]", "ratio.target=0.2", "ratio.of=units"]
    assert plan.main(words) == 0
    (cfg,) = composed(words)
    preflight.check(cfg)


def test_a_config_that_was_changed_is_found_without_weights(unreadable: Path) -> None:
    text = (unreadable / "config.json").read_text()
    (unreadable / "config.json").write_text(text.replace('"model_type"', ' "model_type"'))
    with pytest.raises(CheckpointError, match=r"config\.json.*SHA-256"):
        outline(unreadable)


@pytest.mark.parametrize("read", [load, outline])
@pytest.mark.parametrize(
    "name", ["extra.safetensors", "model-00002-of-00002.safetensors", "x.safetensors.index.json"]
)
def test_weights_that_are_not_listed_are_refused(tmp_path: Path, name: str, read) -> None:
    folder = save(llama(), None, tmp_path / "out")
    read(folder)
    save_file({"lm_head.weight": torch.zeros(100, 48)}, folder / name)
    with pytest.raises(CheckpointError, match=f"{name}: not among the files"):
        read(folder)


def test_a_weight_file_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = save(llama(), None, tmp_path / "out")
    shutil.move(folder / "model.safetensors", tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"model\.safetensors, which is missing"):
        outline(folder)
