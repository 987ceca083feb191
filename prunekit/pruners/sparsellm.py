"""SparseLLM (Bai et al., NeurIPS 2024, arXiv 2402.17946): SparseGPT, and then the matrices of each
feed-forward block again, by turns with what passes between them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunekit import graph
from prunekit.activations import processes
from prunekit.activations.blockwise import BlockRun
from prunekit.activations.done_blocks import Outcome, packed, unpacked
from prunekit.activations.gram import grams
from prunekit.activations.hooks import hook_activations, pass_tokens
from prunekit.activations.runs import forward
from prunekit.activations.sharing import places_of, reaching, watched
from prunekit.activations.storage import PassOptions, Precision, Store
from prunekit.architecture.linear import weight_of
from prunekit.architecture.matrices import matrix, module_name
from prunekit.errors import ConfigError
from prunekit.graph.feed_forward import FeedForward, Neurons, Rows, feed_forwards, neurons_of
from prunekit.graph.replay import Span, record
from prunekit.problem import Expected, Problem
from prunekit.pruners.columnwise import Columns, check_columns
from prunekit.pruners.matrixwise import Ridge, local_counts, warn_by_matrix, write
from prunekit.registry import Above, Positive, pruners
from prunekit.selection.elements import NM, Pattern
from prunekit.solvers.sparsegpt import inverse_factor
from prunekit.solvers.sparsellm import Ffn, Terms, alternate
from prunekit.types import Group, Pruned

Factors = dict[str, tuple[Tensor, Tensor]]
"""By module: the factor of its input's inverse gram matrix, and which inputs are always zero."""


def check_sparsellm(
    problem: Problem,
    *,
    pattern: Pattern | None,
    block: int,
    targets: list[str] | None,
    steps: int,
    **_: Any,
) -> Expected:
    """Raises ConfigError where SparseGPT would, and where there is no feed-forward block to go on
    with.
    """
    expected = check_columns(problem, pattern, block, targets, "sparsellm")
    if steps > 1:
        whole_blocks(problem.model, expected.groups)
    return expected


def whole_blocks(model: nn.Module, groups: list[Group]) -> list[FeedForward]:
    """The feed-forward blocks all of whose matrices are among `groups`. Raises ConfigError where
    there is none.
    """
    modules = {module_name(g) for g in groups}
    found = [
        f
        for f in feed_forwards(model, graph.discover(model, verify=False))
        if f.modules <= modules
        and len(f.columns) == weight_of(model.get_submodule(f.reader)).shape[1]
    ]
    if not found:
        raise ConfigError(
            "pruner=sparsellm goes on where pruner=sparsegpt ends with feed-forward blocks of "
            "linear modules, and none is among the matrices: widen pruner.targets, or give "
            "pruner=sparsegpt"
        )
    return found


@pruners.register(
    paper="arXiv 2402.17946", year=2024, needs="data", out="zeros", check=check_sparsellm
)
@torch.no_grad()
def sparsellm(
    problem: Problem,
    *,
    pattern: NM = None,
    block: Positive = 128,
    ridge: Ridge = 0.01,
    steps: Positive = 4,
    alpha: Above = 5.0,
    beta: Above = 5.0,
    gamma: Above = 5.0,
    descents: Positive = 2,
    rate: Above = 0.01,
    refit_ridge: Ridge = 1e-4,
    targets: list[str] | None = None,
    store: Store = "memory",
    precision: Precision = "model",
) -> Pruned:
    """Zeroes elements as SparseGPT does, then improves each feed-forward block for the sake of its
    output; the best step's matrices are kept, so its error is never larger than SparseGPT's.

    Args:
        pattern: "2:4" keeps 2 of every 4 consecutive inputs; the ratio must agree. "N:8" lets the
            ratio decide for each matrix.
        block: inputs among whose elements those with the least `w^2 / U_jj^2` go.
        ridge: of SparseGPT, in units of the gram's mean diagonal; it grows, with a warning, where
            rounding leaves no Cholesky factor.
        steps: outer steps; 1 is SparseGPT.
        alpha: weight of what the first matrices put out being what they should.
        beta: weight of the output.
        gamma: weight of the neurons being what the activation makes of it.
        descents: gradient steps on what enters the activation, where there is no closed form.
        rate: of these steps.
        refit_ridge: of the refits on the matrices' distance from their dense values, in units of
            the gram's mean diagonal.
        targets: names or globs of the linear modules in a block; null takes all. A feed-forward
            block that they do not hold in full is left as SparseGPT makes it.
        store: where activations between blocks wait.
        precision: of the forwards.

    Raises ConfigError where a pattern fits no matrix or ratio, and where the neurons of a block are
    not an activation, or an activation times a linear map.
    """
    groups = problem.matrices(targets)
    warn_by_matrix(problem, groups)
    counts = local_counts(problem, groups, pattern, "sparsellm")
    part = [g for g in groups if counts[g.name]]
    blocks = studied(problem, part) if steps > 1 and part else []
    columns = Columns(problem.model, counts, pattern, block, ridge)
    terms = Terms(alpha, beta, gamma, descents, rate)

    def solve(part: list[Group], run: BlockRun) -> Outcome:
        by_module = {module_name(g): g for g in part}
        inside = [(f, n) for f, n in blocks if f.modules <= by_module.keys()]
        work = [Work(columns, f, n, {m: by_module[m] for m in f.modules}) for f, n in inside]
        places = places_of(problem.model, [w.first for w in work])
        seen = {n: w.see for w in work for n in watched(problem.model, places[w.first])}
        seeing: AbstractContextManager[object] = hook_activations(problem.model, inputs=seen)
        if processes.count() > 1:  # no sums over tokens: each process sees the whole text
            with seeing:
                pass_tokens(reaching(run, places), "inputs")
            seeing = nullcontext()
        with seeing:
            shown = grams(problem.model, part, run)
        factors: Factors = {}
        for alike, gram in shown:
            factors |= dict.fromkeys(map(module_name, alike), columns.prune(alike, gram))
        made = {w.block.name: w.improve(factors, steps, terms, refit_ridge) for w in work}
        outcome = columns.outcome(part)
        return outcome | packed(errors={n: torch.tensor(e).double() for n, e in made.items()})

    errors: dict[str, list[float]] = {}
    options = PassOptions(store, precision)
    for row, run in problem.by_block(groups, counts, options, resumable=True):
        here = [g for g in row if counts[g.name]]
        found = run.once(partial(solve, here, run), [g.matrix for g in here])
        columns.take(here, found)
        errors |= {n: e.tolist() for n, e in unpacked(found, "errors").items()}
    notes = columns.notes() | {"feed_forward_errors": errors}
    return Pruned(problem.model, columns.kept, groups, {}, notes)


def studied(problem: Problem, groups: list[Group]) -> list[tuple[FeedForward, Neurons]]:
    """The feed-forward blocks with the way in which their neurons come about, by running the first
    samples through.
    """
    model = problem.model
    found = whole_blocks(model, groups)
    spans = {f.name: Span(tuple({r.module for r in f.makers}), f.reader) for f in found}
    passes = (forward(model, ids[None], head=False) for ids in problem.tokens)
    replays = record(model, spans, passes)
    for f in found:
        if f.name not in replays:
            raise ConfigError(
                f"no calibration token goes from {' and '.join(spans[f.name].starts)} to "
                f"{f.reader} (an idle expert?): calibrate on more text, or narrow pruner.targets"
            )
    return [(f, neurons_of(model, f, replays[f.name])) for f in found]


class Work:
    """A feed-forward block on which work is going on: its dense matrices and its input."""

    def __init__(
        self, columns: Columns, block: FeedForward, neurons: Neurons, groups: dict[str, Group]
    ) -> None:
        self.columns, self.block, self.neurons, self.groups = columns, block, neurons, groups
        self.model = columns.model
        self.dense = {m: matrix(self.model, g).float().clone() for m, g in groups.items()}
        self.inputs: list[Tensor] = []

    @property
    def first(self) -> str:
        return self.block.makers[0].module

    def see(self, x: Tensor) -> None:
        """Take in the block's input `(..., C)`."""
        self.inputs.append(x.reshape(-1, x.shape[-1]).float().clone())

    def as_ffn(self, matrices: dict[str, Tensor]) -> Ffn:
        """The block with these matrices, by module."""

        def bias_of(module: str) -> Tensor | None:
            bias: Tensor | None = self.model.get_submodule(module).bias  # type: ignore[assignment]
            return None if bias is None else bias.float()

        def rows(rows: Rows) -> tuple[Tensor, Tensor | None]:
            index = rows.index.to(matrices[rows.module].device)
            bias = bias_of(rows.module)
            return matrices[rows.module][index], None if bias is None else bias[index]

        up, up_bias = rows(self.neurons.up)
        gate, gate_bias = rows(self.neurons.gate) if self.neurons.gate else (None, None)
        reader = self.block.reader
        down = matrices[reader][:, self.block.columns.to(up.device)]
        return Ffn(self.neurons.act, up, down, gate, up_bias, bias_of(reader), gate_bias)

    def as_matrices(self, ffn: Ffn) -> dict[str, Tensor]:
        """The other way round; outputs of a maker that make no neuron stay dense."""
        out = {m: W.clone() for m, W in self.dense.items()}
        out[self.neurons.up.module][self.neurons.up.index] = ffn.up
        if self.neurons.gate and ffn.gate is not None:
            out[self.neurons.gate.module][self.neurons.gate.index] = ffn.gate
        out[self.block.reader][:, self.block.columns] = ffn.down
        return out

    def improve(
        self, factors: Factors, steps: int, terms: Terms, refit_ridge: float
    ) -> list[float]:
        """Outer steps from the second on, and the best matrices into the model. Returns the errors
        of the output, step by step.
        """
        made: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []

        def reprune(full: Ffn, pp: Tensor) -> Ffn:
            new, masks = {}, {}
            for module, W in self.as_matrices(full).items():
                g = self.groups[module]
                U, dead = factors[module]
                if module == self.block.reader:
                    U, _ = inverse_factor(pp, self.columns.ridge, g.name)
                    dead = pp.diagonal() == 0
                new[module], masks[module], _ = self.columns.solve(g, W, U, dead)
            made.append((new, masks))
            return self.as_ffn(new)

        x = torch.cat(self.inputs)
        self.inputs.clear()
        now = {m: matrix(self.model, g).float() for m, g in self.groups.items()}
        _, errors = alternate(
            self.as_ffn(self.dense),
            self.as_ffn(now),
            x,
            reprune,
            steps=steps,
            terms=terms,
            ridge=refit_ridge,
            name=self.block.name,
        )
        best = errors.index(min(errors))
        if best:
            new, masks = made[best - 1]
            for m, g in self.groups.items():
                self.columns.kept[g.name] = write(self.model, g, new[m], masks[m])
                del self.columns.costs[g.name]  # of SparseGPT's weights
        return errors
