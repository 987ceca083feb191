"""A little text to learn from."""

from __future__ import annotations

import pytest


@pytest.fixture
def text(tmp_path) -> str:
    path = tmp_path / "some.txt"
    path.write_text("the quick brown fox jumps over the lazy dog again and again. " * 40)
    return str(path)
