"""What a method of each family chooses on a tiny model. As a script under torchrun: what the first
process chooses alone, then what each of them chooses once they share the text.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from problems import problem, uniform
from tiny_models import tiny_model

from prunekit.registry import pruners
from prunekit.runner.distributed import join_others

TEXT = torch.randint(8, 100, (6, 16), generator=torch.Generator().manual_seed(0))
METHODS = {
    "taylor": ({"name": "oneshot"}, {"name": "taylor"}, uniform(0.25)),
    "taylor_by_block": (
        {"name": "oneshot"},
        {"name": "taylor", "by_block": True},
        uniform(0.25),
    ),
    "wanda": ({"name": "unstructured"}, {"name": "wanda"}, uniform(0.5, "prunable")),
    "sparsegpt": ({"name": "sparsegpt"}, None, uniform(0.5, "prunable")),
    "flap": ({"name": "layerwise", "compensate": "bias"}, {"name": "flap"}, uniform(0.25)),
    "obs": ({"name": "obs", "ridge": 64, "dense_ridge": 64}, None, uniform(0.25)),
    "shortgpt": (
        {"name": "oneshot", "kinds": ["blocks"]},
        {"name": "block_influence"},
        uniform(0.25),
    ),
    "angular": ({"name": "oneshot", "kinds": ["blocks"]}, {"name": "angular"}, uniform(0.25)),
    "reap": ({"name": "layerwise", "kinds": ["experts"]}, {"name": "experts"}, uniform(0.25)),
    "database": ({"name": "database", "levels": 4, "ridge": 64}, None, {"name": "milp"}),
    "sparse_database": (
        {"name": "sparse_database"},
        None,
        {"name": "milp", "target": 0.5, "of": "prunable"},
    ),
    "sparsellm": ({"name": "sparsellm", "steps": 3}, None, uniform(0.7, "prunable")),
    "admm": ({"name": "admm"}, None, uniform(0.5, "prunable")),
    "slicegpt": ({"name": "slicegpt"}, None, uniform(0.25)),
    "bonsai": ({"name": "bonsai", "masks": 12, "rounds": 1}, None, uniform(0.25)),
    "llm_surgeon": ({"name": "llm_surgeon", "shots": 1}, None, uniform(0.25)),
    "shortened": ({"name": "oneshot", "kinds": ["blocks"]}, {"name": "block_ppl"}, uniform(0.25)),
}
WHOLE = ("llm_surgeon", "shortened")
"""Not written for several processes: each of them sees the whole text."""


def choices() -> dict[str, tuple[dict[str, torch.Tensor], int]]:
    """By method what it keeps (where it removes no units, the tokens that are likeliest then), and
    how many samples the last block's feed-forward saw in the whole pruning.
    """
    found = {}
    for name, (pruner, criterion, ratio) in METHODS.items():
        model = tiny_model("mixtral" if name == "reap" else "llama", 4, hidden=32, ffn=48)
        seen: list[int] = []
        layer = model.model.layers[-1].mlp
        layer.register_forward_hook(lambda module, args, out, n=seen: n.append(len(args[0])))
        asked = problem(model, TEXT, criterion=criterion, ratio=ratio)
        pruned = pruners.build(pruner)(asked)
        count = sum(seen)
        likeliest = {"tokens": pruned.model(TEXT).logits.argmax(-1)}
        found[name] = (pruned.kept or likeliest, count)
    return found


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    if rank == "0":
        torch.save(choices(), folder / "alone.pt")
    join_others()
    torch.save(choices(), folder / f"{rank}.pt")
