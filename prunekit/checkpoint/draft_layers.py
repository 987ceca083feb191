"""Layers that predict further tokens (MTP, draft layers): transformers reads a model without them,
so that a pruned one has none, and its config must not say otherwise.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from prunekit.checkpoint.integrity import read_json

log = logging.getLogger("prunekit")
COUNT = "num_mtp_layers"
"""The field as transformers calls it; `attribute_map` has the name of a checkpoint."""


def without_draft_layers(file: Path, model: Any) -> None:
    """Set their number in a config.json to 0 where the model has none of their weights.

    They would have the experts of before: `generate(use_mtp=True)` and engines that draft with them
    would look for weights that are not there.
    """
    text = model.config.get_text_config()
    count = getattr(text, COUNT, None)
    if not count or any("mtp" in name or "nextn" in name for name, _ in model.named_parameters()):
        return
    content = read_json(file)
    for part in (content, *(v for v in content.values() if isinstance(v, dict))):
        for name in {COUNT, text.attribute_map.get(COUNT, COUNT)} & part.keys():
            part[name] = 0
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    log.info("%s goes from %d to 0: transformers reads a model without these layers", COUNT, count)
