"""BESA (Xu et al., ICLR 2024, arXiv 2402.16880): what each matrix of a block, or each of its rows,
should lose is learned by gradient on what the block puts out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from prunekit.activations.blockwise import BlockRun, groups_by_block, iterate_blocks
from prunekit.activations.hooks import first_tensor
from prunekit.activations.storage import Activations, PassOptions, Precision, Store, autocast
from prunekit.architecture.blocks import block_names
from prunekit.architecture.linear import is_linear
from prunekit.architecture.mapped import beside
from prunekit.architecture.matrices import matrix, module_name, to_out_in, zero_elements
from prunekit.errors import ConfigError
from prunekit.problem import Problem
from prunekit.registry import LearningRate, Positive, Share, ratios
from prunekit.scoring.wanda import input_norms, wanda_score
from prunekit.selection.elements import floor_share, or_sizes
from prunekit.solvers.besa import Matrix, channel_error, learn, project, ranked
from prunekit.types import Allocation, Group, Kept, Scores

Weights = dict[str, Tensor]


def ranking(per: str, **_: Any) -> str:
    """What the allocation will say, known from the options."""
    return "rows" if per == "row" else "local"


@ratios.register(paper="arXiv 2402.16880", year=2024, needs="data", ranking=ranking)
def besa(
    problem: Problem,
    groups: list[Group],
    *,
    target: Share = 0.5,
    per: Literal["matrix", "row"] = "row",
    prefix: Literal["pruned", "dense"] = "pruned",
    candidates: Positive = 100,
    epochs: Positive = 1,
    rate: LearningRate = 0.05,
    pull: Annotated[float, Field(ge=0)] = 5.0,
    store: Store = "memory",
    precision: Precision = "model",
) -> Allocation:
    """Every block loses `target` of its weights; how that is spread over its matrices, or their
    rows, is learned on the block's output, weights going in the criterion's order.

    Args:
        per: what has a share of its own: a `matrix` (the paper's layer-wise form) or a `row`.
        prefix: what feeds a block: the `pruned` blocks before it, or the `dense` ones.
        candidates: a share is the mean of candidate shares d / candidates.
        epochs: passes over the calibration text, a step of Adam with each sample.
        rate: of Adam, on the candidates' logits.
        pull: weight of the squared relative miss of the target beside the error.
        store: where activations between blocks wait.
        precision: of the forwards.

    The order is Wanda's where there is no criterion. A block keeps equal shares where learned ones
    did not lower its error over the text; the notes have both. Raises ConfigError for units other
    than single weights of linear modules.
    """
    check_weights(problem.model, groups)
    model, tokens = problem.model, problem.tokens
    if target == 0:
        return Allocation({g.name: 0 for g in groups})
    blocks = block_names(model)
    rows = groups_by_block(groups, blocks)
    per_row: dict[str, Tensor] = {}
    errors: dict[str, list[float]] = {"learned": [], "uniform": []}
    before: dict[str, Tensor] = {}
    kept: Kept = {}
    try:
        for run in iterate_blocks(model, blocks, tokens, PassOptions(store, precision, batch=1)):
            if not (row := rows[run.block]):
                continue
            recording = _Recording(run, store)
            order = _order(problem, row, recording)
            block = _Block(run, row, order, recording.whole(), prefix == "pruned")
            removed, seen = _allocate(
                block,
                target,
                epochs,
                per_row=per == "row",
                candidates=candidates,
                rate=rate,
                pull=pull,
            )
            for name, error in seen.items():
                errors[name].append(error)
            per_row |= removed
            if prefix == "pruned":
                before |= {g.name: matrix(model, g).detach().cpu().clone() for g in row}
                stays = block.masks(removed)
                zero_elements(model, row, stays)
                kept |= {g.name: beside(stays[g.name].cpu(), matrix(model, g)) for g in row}
            run.left = block.put_out
    finally:
        with torch.no_grad():
            for g in groups:
                if g.name in before:
                    matrix(model, g).copy_(before[g.name])
    return Allocation(
        {g.name: int(per_row[g.name].sum()) for g in groups},
        ranking="rows" if per == "row" else "local",
        rows=per_row if per == "row" else {},
        notes={"besa": errors},
        kept=kept if per == "row" else {},
    )


def check_weights(model: nn.Module, groups: list[Group]) -> None:
    """Raises ConfigError for units other than single weights of linear modules."""
    modules = dict(model.named_modules())
    for g in groups:
        module = modules.get(module_name(g)) if g.kind == "weights" else None
        if module is None or not is_linear(module):
            raise ConfigError(
                f"ratio=besa allocates single weights; {g.name} is no matrix of a linear module"
            )


def _order(problem: Problem, groups: list[Group], run: BlockRun) -> Scores:
    """(outputs, inputs) scores of each matrix."""
    model = problem.model
    if problem.criterion is None:
        norms = input_norms(model, groups, run)
        scores = {g.name: wanda_score(matrix(model, g), norms[g.name]) for g in groups}
    else:
        found = problem.score(groups, run)
        scores = {g.name: to_out_in(model, g, found[g.name]) for g in groups}
    return {g.name: or_sizes(scores[g.name], matrix(model, g), g.name) for g in groups}


class _Recording(BlockRun):
    """Keeps what the block puts out while something else is measured in it."""

    def __init__(self, run: BlockRun, store: Store) -> None:
        super().__init__(run.model, run.tokens, run.feed, run.block, run.inputs)
        self.counts, self.store = run.counts, store
        self.kept: Activations | None = None

    @torch.no_grad()
    def outputs(self) -> Iterator[tuple[slice, Tensor]]:
        kept: Activations | None = None
        for rows, out in super().outputs():
            kept = kept or Activations(len(self.tokens), out, self.store)
            kept[rows] = out
            yield rows, out
        self.kept = kept

    def whole(self) -> Activations:
        """What the block puts out for the whole text."""
        if self.kept is None:
            for _ in self.outputs():
                pass
        assert self.kept is not None
        return self.kept


class _Block:
    """A block with the order in which the weights of its matrices go, and its dense outputs."""

    def __init__(
        self,
        run: BlockRun,
        groups: list[Group],
        order: Scores,
        dense: Activations,
        in_place: bool,
    ) -> None:
        """in_place: what `total_error` last computed takes the place of the dense outputs."""
        self.run, self.groups, self.dense, self.in_place = run, groups, dense, in_place
        self.put_out: Activations | None = None if in_place else dense
        model = run.model
        self.matrices: dict[str, Matrix] = {
            g.name: ranked(matrix(model, g).detach().clone(), order[g.name]) for g in groups
        }
        self.others = {n: p.detach() for n, p in run.module.named_parameters()}

    def output(self, weights: Weights, batch: int) -> Tensor:
        """Of the block for a batch, with these weights `(outputs, inputs)` in it."""
        run, model = self.run, self.run.model
        prefix = run.feed.blocks[run.block] + "."
        mine = {
            g.matrix.removeprefix(prefix): to_out_in(model, g, weights[g.name]) for g in self.groups
        }
        args, kwargs = run.feed.calls[run.block][batch]
        x = run.inputs[run.feed.rows[batch]]
        with autocast(run.feed.precision, x.device):
            out = functional_call(run.module, self.others | mine, (x, *args), kwargs)
        return first_tensor(out)

    def error(self, weights: Weights, batch: int) -> Tensor:
        """Of the block's output for a batch, with these weights in it."""
        return channel_error(self.output(weights, batch), self.dense[self.run.feed.rows[batch]])

    @torch.no_grad()
    def total_error(self, removed: dict[str, Tensor], last: bool) -> float:
        """Mean over the text, with so many weights of each row removed. `last`: nothing is compared
        with the dense outputs after this.
        """
        weights = self.weights(removed)
        errors = []
        for i, rows in enumerate(self.run.feed.rows):
            out = self.output(weights, i)
            errors.append(channel_error(out, self.dense[rows]))
            if last and self.in_place:
                self.dense[rows] = out
        return float(torch.stack(errors).mean())

    def weights(self, removed: dict[str, Tensor]) -> Weights:
        """The weights less the first so many of each row."""
        stays = self.stays(removed)
        return {name: m.weight * stays[name] for name, m in self.matrices.items()}

    def masks(self, removed: dict[str, Tensor]) -> Kept:
        """Of what stays then, stored like the matrices."""
        stays, model = self.stays(removed), self.run.model
        return {g.name: to_out_in(model, g, stays[g.name]).contiguous() for g in self.groups}

    def stays(self, removed: dict[str, Tensor]) -> Kept:
        """(outputs, inputs) of each matrix."""
        return {
            name: m.rank >= removed[name].to(m.rank.device)[:, None]
            for name, m in self.matrices.items()
        }


def _allocate(
    block: _Block, target: float, epochs: int, **options: Any
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """(outputs,) weights to remove of each row by matrix, and the error of learned and of equal
    shares; `options` are those of `learn`.
    """
    batches = len(block.run.feed.rows)
    steps = tqdm(range(epochs * batches), desc="shares", unit="step", leave=False, delay=2)

    def error(weights: Weights, step: int) -> Tensor:
        steps.update()
        return block.error(weights, step % batches)

    found = learn(block.matrices, error, target, epochs * batches, **options)
    steps.close()
    count = floor_share(sum(m.weight.numel() for m in block.matrices.values()), target)
    learned = _whole(block, found, count)
    uniform = _whole(block, {n: torch.full_like(s[:1], target) for n, s in found.items()}, count)
    equal = block.total_error(uniform, last=False)
    errors = {"learned": block.total_error(learned, last=True), "uniform": equal}
    if errors["learned"] > equal:
        return uniform, errors
    block.put_out = block.dense
    return learned, errors


def _whole(block: _Block, shares: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """Whole numbers for each row that meet the count."""
    shapes = [m.weight.shape for m in block.matrices.values()]
    inputs, rows = [s[1] for s in shapes], [s[0] for s in shapes]
    numbers = project([shares[n] for n in block.matrices], inputs, rows, count)
    return {
        name: n.expand(len(m.weight)).contiguous()
        for (name, m), n in zip(block.matrices.items(), numbers, strict=True)
    }
