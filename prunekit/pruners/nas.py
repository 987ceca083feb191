"""Sub-networks of one network, trained together and then searched for those that no other one
dominates in loss and cost (Klein et al., 2024, arXiv 2405.02267).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from prunekit import graph
from prunekit.activations.runs import ModelRun, mean_loss
from prunekit.architecture.blocks import linear_names
from prunekit.data.training_examples import all_learnt
from prunekit.errors import ConfigError
from prunekit.problem import Expected, Problem, expect
from prunekit.registry import LearningRate, Natural, Positive, Seed, pruners
from prunekit.scoring.lean_backward import lean_loss
from prunekit.selection.prices import REQUEST, Request
from prunekit.selection.subnet_costs import Cost, SubnetPrices, SubnetSizes, costs_of
from prunekit.selection.subnets import Choice, Extent, Subnets
from prunekit.selection.units import expand_to_all_blocks
from prunekit.solvers.pareto import Point, Search, check_search, front, searched
from prunekit.training.low_rank import Updates, check_updates
from prunekit.training.recipe import Recipe, micro_batches
from prunekit.training.supernet import Supernet, train_supernet
from prunekit.types import Group, Kept, Pruned, Scores, tensor_of

Kinds = Annotated[list[Literal["heads", "neurons", "blocks"]], Field(min_length=1)]
Samples = Annotated[int, Field(ge=2)]
Weight = Annotated[float, Field(ge=0, le=1)]
Part = Annotated[float, Field(gt=0, lt=1)]
WORST = math.log(1e8)
"""Loss that stands for any beyond it."""


def check_nas(
    problem: Problem,
    *,
    kinds: list[str],
    depth: bool,
    search: Search,
    validation: float,
    steps: int,
    r: int,
    targets: list[str] | None,
    batch: int,
    micro_batch: int,
    **_: Any,
) -> Expected:
    """Raises ConfigError where the ratio cannot be met, for a step of fewer micro-batches than the
    sandwich has layers, for too few samples to set some aside, and where optuna is missing.
    """
    check_search(search)
    expected = expect(problem, problem.groups(kinds))
    if steps and micro_batches(batch, micro_batch) < 3:
        raise ConfigError(
            f"batch={batch} in micro-batches of {micro_batch}: a step reads by the whole network, "
            "the smallest one and random ones, so at least three micro-batches"
        )
    if steps and r:
        check_updates(problem.model, linear_names(problem.model, targets))
    if problem.has_data and held_out(problem.tokens, validation) >= len(problem.tokens):
        raise ConfigError(
            f"calib.samples={len(problem.tokens)}, of which a share of {validation} is set aside: "
            "none is left to train on"
        )
    groups = with_depth(problem, expected.groups, depth)
    return Expected(groups, None, remark="What goes of which group is searched for.")


@pruners.register(
    paper="arXiv 2405.02267",
    year=2024,
    needs="data",
    out="self-contained",
    scored=True,
    trains=True,
    check=check_nas,
)
def nas(
    problem: Problem,
    *,
    kinds: Kinds = ["heads", "neurons"],  # noqa: B006 (never mutated; the YAML states it)
    depth: bool = False,
    space: Extent = "medium",
    levels: Positive = 8,
    steps: Natural = 100,
    r: Natural = 8,
    alpha: Positive = 16,
    targets: list[str] | None = None,
    lr: LearningRate = 1e-4,
    warmup_steps: Natural = 10,
    batch: Positive = 16,
    micro_batch: Positive = 4,
    weight: Weight = 0.5,
    validation: Part = 0.25,
    search: Search = "random",
    samples: Samples = 100,
    of: Cost = "params",
    request: Request = REQUEST,
    save_every: Positive = 100,
    seed: Seed = 0,
) -> Pruned:
    """Trains the model so that its sub-networks do well on its weights, searches for those with the
    least loss at their cost, and cuts out the best one that takes no more than what the ratio alone
    would leave.

    Args:
        kinds: of units that may go, in the order of the criterion.
        depth: whole blocks may go too, the last first.
        space: what is chosen: how much of each kind (`small`), of each group (`medium`), or every
            unit by itself (`large`; with kinds=[blocks] the paper's LAYER).
        levels: steps between a whole group and its last unit, but for `large`.
        steps: of the training, each of `batch` samples: a micro-batch is read by the whole
            network, one by the smallest, the others by random ones (the sandwich rule). 0 trains
            nothing.
        r: rank of the updates that are trained, merged at the end; 0 trains the weights themselves.
        alpha: updates are scaled by alpha / r.
        targets: of the updates; null is all linear modules of the blocks.
        lr: after `warmup_steps`, then linear to 0.
        weight: of the KL to the whole network in the loss, the rest is the text's.
        validation: share of the samples, the last ones, on which sub-networks are compared.
        search: random; stratified (random, sizes spread evenly); from networks that lost the same
            share everywhere, local (neighbours of what nothing dominates) or nsga2 (optuna).
        samples: sub-networks that are measured, the whole and the smallest one among them.
        of: the cost, predicted: `params`, `memory_mib` of weights, MiB of the `kv_cache`, `macs` of
            a prompt, `latency_ms` of a request (a table measured once for a device).
        request: the prompt and the request of the last three; see `ratio=milp`.
        save_every: steps after which the training keeps how far it is.
        seed: of the sub-networks.

    What was trained and measured lies in the cache, so a sweep over ratio.target cuts the Pareto
    set out of one training and one search. Notes have the front (cost, parameters, loss, choice)
    and the cost of what is left, predicted and measured. Ratio 0 changes nothing.
    """
    model = problem.model
    units = problem.groups(kinds)
    check_search(search)
    allocation = problem.allocate(units)
    if allocation.empty:
        return Pruned(model, {}, units, {}, {"counts": allocation.counts})
    scores = problem.score(units, problem.run(allocation.counts))
    groups = with_depth(problem, units, depth)
    subnets = Subnets(groups, space, {g.name: order(g, scores) for g in groups}, levels)
    aside = held_out(problem.tokens, validation)
    net = Supernet(model, groups, sandwich(subnets, micro_batches(batch, micro_batch), seed))
    recipe = Recipe(
        lr=lr,
        warmup_steps=warmup_steps,
        max_steps=steps,
        batch=batch,
        micro_batch=micro_batch,
        save_every=save_every,
        progress=problem.training,
        seed=seed,
    )
    updates = Updates(linear_names(model, targets), r, alpha, dropout=0.0) if r else None
    key: list[Any] = [list(kinds), depth, space, levels, aside, r, alpha, targets, weight, steps]
    key += [lr, warmup_steps, batch, micro_batch, seed]
    key += [{g.name: [g.modules, subnets.order[g.name].tolist()] for g in groups}]
    if steps:
        train(problem, net, key, Lesson(problem.tokens[:-aside], updates, recipe, weight))
    costs = costs_of(model, problem.everything(), groups, of, request, problem.remember)
    key += [of, request if of != "params" else {}]
    choices, points = measured(
        problem, net, subnets, costs, key, aside=aside, search=search, samples=samples, seed=seed
    )
    budget = costs.of(subnets.without(allocation.counts))
    best = within(points, budget)
    kept = subnets.kept(choices[best])
    notes: dict[str, Any] = {"of": of, "budget": budget, "predicted": points[best][1]}
    notes["front"] = front_notes(subnets, SubnetSizes(model, groups), choices, points)
    everything = problem.units(list(dict.fromkeys(g.kind for g in groups)))
    graph.remove(model, expand_to_all_blocks(kept, groups, everything))
    if isinstance(costs, SubnetPrices):
        notes["measured"] = costs.prices.measure(model)
    return Pruned(model, kept, groups, scores, notes)


def with_depth(problem: Problem, groups: list[Group], depth: bool) -> list[Group]:
    """The groups, and where `depth` says so the blocks."""
    there = any(g.kind == "blocks" for g in groups)
    return [*groups, *problem.groups(["blocks"])] if depth and not there else groups


def order(group: Group, scores: Scores) -> Tensor:
    """Units in the order in which they go; without scores the last first."""
    if group.name in scores:
        return scores[group.name].argsort(stable=True).cpu()
    return torch.arange(group.units).flip(0)


def held_out(tokens: Tensor, share: float) -> int:
    """How many samples are set aside."""
    return max(1, round(share * len(tokens)))


def sandwich(subnets: Subnets, per_step: int, seed: int) -> Callable[[int], Kept]:
    """Which sub-network reads the micro-batch of a number: by turns the whole one, the smallest,
    and random ones, which the number decides.
    """

    def cycle(number: int) -> Kept:
        place = number % per_step
        if place < 2:
            return subnets.kept((subnets.whole, subnets.smallest)[place])
        return subnets.kept(subnets.draw(torch.Generator().manual_seed(seed + number)))

    return cycle


class Lesson(NamedTuple):
    """What the supernet is trained on, and how; see `train_supernet`."""

    tokens: Tensor
    updates: Updates | None
    recipe: Recipe
    weight: float


def train(problem: Problem, net: Supernet, key: list[Any], lesson: Lesson) -> None:
    """The weights become what the training makes of them, or made of them once."""
    model, updates = net.model, lesson.updates

    def compute() -> dict[str, Tensor]:
        examples = [all_learnt(row) for row in lesson.tokens.tolist()]
        train_supernet(net, updates, examples, lesson.recipe, lesson.weight)
        names = [n for n, _ in model.named_parameters()]
        if updates:
            names = [f"{n}.weight" for n in updates.names]
        return {n: tensor_of(model, n).detach().cpu().clone() for n in names}

    weights = problem.remember(__name__, "supernet", key, compute)
    with torch.no_grad():
        for name, value in weights.items():
            tensor_of(model, name).copy_(value)


def measured(
    problem: Problem,
    net: Supernet,
    subnets: Subnets,
    costs: SubnetSizes | SubnetPrices,
    key: list[Any],
    *,
    aside: int,
    search: Search,
    samples: int,
    seed: int,
) -> tuple[list[Choice], list[Point]]:
    """Sub-networks with their loss on the last `aside` samples, and their cost."""

    def compute() -> dict[str, Tensor]:
        run = ModelRun(net.model, problem.tokens[-aside:])
        bar = tqdm(total=samples, desc="sub-networks", unit="network")
        with net.on_model(), lean_loss(net.model), torch.inference_mode():

            def evaluate(choice: Choice) -> Point:
                kept = subnets.kept(choice)
                net.set(kept)
                bar.update()
                return loss(run), float(costs.of(kept))

            choices, points = searched(subnets, evaluate, search, samples, seed)
        bar.close()
        measures = torch.tensor(points, dtype=torch.float64)
        return {"choices": torch.tensor(choices), "points": measures}

    found = problem.remember(__name__, "search", [*key, search, samples], compute)
    points = [(float(a), float(b)) for a, b in found["points"].tolist()]
    return [tuple(row) for row in found["choices"].tolist()], points


def loss(run: ModelRun) -> float:
    """Mean over the predicted tokens; `WORST` for what is no number."""
    value = float(mean_loss(run))
    return min(value, WORST) if math.isfinite(value) else WORST


def within(points: list[Point], budget: float) -> int:
    """The one of least loss that costs at most so much: the smallest one is there."""
    return min((i for i in front(points) if points[i][1] <= budget), key=lambda i: points[i][0])


def front_notes(
    subnets: Subnets, sizes: SubnetSizes, choices: list[Choice], points: list[Point]
) -> list[dict[str, Any]]:
    """What nothing dominates, the cheapest first."""
    notes = []
    for i in front(points):
        (loss, cost), choice = points[i], choices[i]
        params = sizes.of(subnets.kept(choice))
        notes.append({"cost": cost, "params": params, "loss": loss, "choice": list(choice)})
    return notes
