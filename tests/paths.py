"""Where the project is, and the numbers computed by the methods' authors' code."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
