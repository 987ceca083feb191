"""Where the project is, and the numbers computed by the methods' authors' code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"


def authors_numbers(name: str) -> dict[str, Tensor]:
    """The arrays of one golden file, by name."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {k: torch.from_numpy(v) for k, v in file.items()}
