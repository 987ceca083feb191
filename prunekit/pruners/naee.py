"""NAEE (Lu et al., ACL 2024, arXiv 2402.14800): the experts without which a layer's output changes
least, by trying sets of them.
"""

from __future__ import annotations

from typing import Any

import torch

from prunekit.activations.blockwise import BlockRun
from prunekit.activations.done_blocks import Outcome
from prunekit.activations.storage import PassOptions, Precision, Store
from prunekit.graph.discovery import Discovery
from prunekit.problem import Problem
from prunekit.pruners.expert_blocks import check_experts_by_block, remove_by_block
from prunekit.registry import Positive, pruners
from prunekit.solvers.expert_search import ExpertLayer, search
from prunekit.types import Group, Pruned


@pruners.register(
    paper="arXiv 2402.14800",
    year=2024,
    needs="data",
    out="self-contained",
    kinds=("experts",),
    check=check_experts_by_block,
)
@torch.no_grad()
def naee(
    problem: Problem,
    *,
    limit: Positive = 256,
    store: Store = "memory",
    precision: Precision = "model",
) -> Pruned:
    """Removes from each layer the experts without which its output on the calibration text changes
    least, tried together, layer after layer on what the pruned ones before it put out.

    Args:
        limit: of sets: where there are more (16 experts less 4 are 1,820) experts go one after the
            other, each time the one whose loss, beside those gone, is least; the paper stops at 8.
        store: where the activations between two blocks wait.
        precision: of the forwards.

    The loss is the sum over samples of the norm of the difference; experts taken out cannot be
    picked, so that the router weighs the others anew, as the pruned model will. Each set is a
    forward of the layer, whose inputs and outputs are held. Notes have the loss of each layer.
    Raises ConfigError where the router is not understood.
    """
    model = problem.model
    groups = check_experts_by_block(problem).groups
    counts = problem.allocate(groups).counts
    notes: dict[str, Any] = {}

    def choose(g: Group, run: BlockRun, known: Discovery) -> Outcome:
        found = search(ExpertLayer(model, g, run, known), counts[g.name], limit)
        loss, tried = torch.tensor(found.loss, dtype=torch.float64), torch.tensor(found.tried)
        return {"stays": found.mask, "loss": loss, "sets": tried}

    def note(g: Group, found: Outcome) -> None:
        notes[g.name] = {"loss": float(found["loss"]), "sets": int(found["sets"])}

    kept = remove_by_block(problem, groups, counts, PassOptions(store, precision), choose, note)
    return Pruned(model, kept, groups, notes={"counts": counts, "naee": notes})
