"""Results by name in a JSON file, written as each one comes, so that a run cut off loses none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class KeptResults(dict[str, Any]):
    """What the file `path` holds."""

    def __init__(self, path: Path):
        super().__init__(json.loads(path.read_text()) if path.exists() else {})
        self.path = path

    def keep(self, name: str, result: Any) -> None:
        """Put `result` in the place of what was known of `name`, in the file too."""
        self[name] = result
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text(json.dumps(self, indent=1))


def by_hand(page: Path, heading: str) -> str:
    """What stands on a page from this heading on, which no command writes."""
    old = page.read_text() if page.exists() else ""
    mark = f"\n{heading}"
    return mark + old.partition(mark)[2] if mark in old else ""
