"""Prefill and decode of a model and of checkpoints made from it, in turns in one process, so that
whatever else runs on the machine touches all of them; ratios are medians of the turns' own ratios.

python benchmarks/speed.py outputs/A/checkpoint outputs/B/checkpoint --model smollm2_135m
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median

import torch
from torch import nn

from prunekit import checkpoint
from prunekit.architecture.timing import prompt_ids, request, waiter
from prunekit.registry import models

Times = list[tuple[float, float]]


@torch.no_grad()
def in_turns(
    of: dict[str, nn.Module], prompt: int, new_tokens: int, repeats: int
) -> dict[str, Times]:
    """Seconds of (prefill, decode) by model, `repeats` of them after an unmeasured round."""
    found: dict[str, Times] = {name: [] for name in of}
    for i in range(repeats + 1):
        for name, model in of.items():
            took = request(model, prompt_ids(model, 1, prompt), new_tokens, waiter(model))
            if i:
                found[name].append(took)
    return found


def table(found: dict[str, Times], new_tokens: int) -> str:
    """Markdown: median milliseconds, and how many times faster than the first model."""
    base = next(iter(found.values()))
    lines = [
        "| model | prefill, ms | decode, ms a token | prefill | decode | request |",
        "|" + "---|" * 6,
    ]
    for name, times in found.items():
        faster = [
            (b[0] / t[0], b[1] / t[1], sum(b) / sum(t)) for b, t in zip(base, times, strict=True)
        ]
        ratios = [f"{median(column):.2f} x" for column in zip(*faster, strict=True)]
        prefill, decode = (1000 * median(column) for column in zip(*times, strict=True))
        lines.append(
            f"| {name} | {prefill:.0f} | {decode / new_tokens:.1f} | {' | '.join(ratios)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument(
        "--model", default="smollm2_135m", help="the dense model, by its name in conf/model"
    )
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    asked = parser.parse_args()
    of = {"dense": models.build({"name": asked.model})()[0].float()}
    of |= {str(path): checkpoint.load(path)[0].float() for path in asked.checkpoints}
    print(table(in_turns(of, asked.prompt, asked.new_tokens, asked.repeats), asked.new_tokens))


if __name__ == "__main__":
    main()
