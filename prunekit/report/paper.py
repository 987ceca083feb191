"""The paper's numbers: small data files under experiments/, one a table, with their source."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunekit.report.metrics import PAPER_UNITS

MODELS = {
    "LLaMA-7B": ("llama_7b", "huggyllama/llama-7b"),
    "LLaMA-13B": ("llama_13b", "huggyllama/llama-13b"),
    "Vicuna-7B": ("vicuna_7b", "lmsys/vicuna-7b-v1.3"),
    "ChatGLM-6B": ("chatglm_6b", "zai-org/chatglm-6b"),
}
"""The paper's names of the models that prunekit can load, and how a configuration says them."""


@dataclass(frozen=True)
class Paper:
    """One table of a paper: (method, tuned) -> {column title: number}. A method that stands at two
    ratios is `Block 20%`, `Block 50%`.
    """

    title: str
    source: str
    model: str
    rows: dict[tuple[str, bool], dict[str, float]]

    def numbers(self, label: str, tuned: bool) -> dict[str, float]:
        """The row that `label` names, or the dense row for `dense`, of two the last one: the
        authors' own measurement; empty where the paper has none.
        """
        if label == "dense":
            dense = [v for (method, _), v in self.rows.items() if method.startswith("dense")]
            return dense[-1] if dense else {}
        return self.rows.get((label, tuned), {})


def folder() -> Path:
    """The experiments: inside the package when installed from a wheel, beside it in a checkout."""
    inside = Path(__file__).parent.parent / "experiments"
    return inside if inside.is_dir() else Path(__file__).parent.parent.parent / "experiments"


def paper(table: str | None) -> Paper | None:
    """The numbers of `llm_pruner/table1`, also for its small twin; None where no paper has any."""
    if not table:
        return None
    path = folder() / table / "paper.json"
    if not path.is_file():
        return None
    content: dict[str, Any] = json.loads(path.read_text())
    pairs = [(r["method"], r["tuned"]) for r in content["rows"]]
    rows = {}
    for r, pair in zip(content["rows"], pairs, strict=True):
        method = r["method"] if pairs.count(pair) == 1 else f"{r['method']} {r['ratio']:.0%}"
        rows[method, r["tuned"]] = {PAPER_UNITS.get(c, c): v for c, v in r["values"].items()}
    models = {r["model"] for r in content["rows"]}
    return Paper(
        content["table"],
        f"{content['paper']} ({content['read_from']})",
        models.pop() if len(models) == 1 else "",
        rows,
    )


def same_model(config: dict[str, Any], name: str) -> bool:
    """Whether a job's model is the paper's, so that the difference of two numbers means
    something.
    """
    model = config["model"]
    return model["name"] in MODELS.get(name, ()) or model.get("path") in MODELS.get(name, ())
