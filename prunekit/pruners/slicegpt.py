"""SliceGPT (Ashkboos et al., ICLR 2024, arXiv 2401.15024): a narrower residual stream, by rotating
it onto its principal directions.

In the network's own basis the method is one projection `Q Q^T` of the stream before every
sub-layer, each found on a stream that is already projected upstream. So the blocks are run as they
are, on projected inputs, and the weights are rotated at the end.

The paper carries the stream from one basis to the next by a full `d' x d'` matrix `Q_r^T Q_w` a
sub-layer. Here `Q_w` is turned within its subspace until that matrix is `I - B B^T` (orthogonal
Procrustes); `B` has at most `d - d'` columns and the function is the same, for a quarter or so of
the extra parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from prunekit.activations.block_inputs import BlockInputs, capture_inputs
from prunekit.activations.hooks import hook_activations
from prunekit.activations.runs import forward, samples_at_once
from prunekit.activations.storage import Activations, PassOptions, Precision, Store
from prunekit.architecture.linear import weight_of
from prunekit.architecture.residual import Stream, Sublayer, gain_and_eps, stream
from prunekit.architecture.sizes import Sizes
from prunekit.architecture.streaming import streaming, turn
from prunekit.errors import ConfigError
from prunekit.problem import Expected, Problem, expect
from prunekit.registry import Positive, pruners
from prunekit.scoring.block_ablation import returning
from prunekit.solvers.rotation import Basis, assemble, removed, turned
from prunekit.types import Group, Pruned

Weighting = Literal["signal", "direction"]
Last = Literal["whole", "output", "sliced"]
Rests = dict[str, tuple[Any, ...] | None]
"""sub-layer -> what follows the activation in its output, None for a bare tensor."""


@dataclass(frozen=True)
class Passage:
    """The text on its way through the sub-layers of a model.

    Attributes:
        inputs: the stream where the text is by now; `feed` are the other arguments of the blocks.
    """

    model: nn.Module
    chain: Stream
    inputs: Activations
    feed: BlockInputs
    rests: Rests

    def stream(self) -> Iterator[Tensor]:
        """The stream as it is, batch by batch."""
        return (self.inputs[rows] for rows in self.feed.rows)

    def through(self, b: int, part: Sublayer) -> Iterator[Tensor]:
        """The stream after one sub-layer of block `b`, batch by batch; it replaces `inputs`."""
        model = self.model
        block = model.get_submodule(self.chain.blocks[b])
        nothing = torch.zeros_like(weight_of(model.get_submodule(part.writers[0]))[0, 0])
        with ExitStack() as others:
            for other in self.chain.sublayers[b]:
                if other is not part:
                    module = model.get_submodule(other.module)
                    others.enter_context(returning(module, nothing, self.rests[other.module]))
            for i, rows in enumerate(self.feed.rows):
                x = self.feed.forward(block, b, i, self.inputs[rows])
                self.inputs[rows] = x
                yield x

    def project(self, Q: Basis) -> None:
        """The stream becomes its part in the space of `Q`."""
        for rows in self.feed.rows:
            x = self.inputs[rows]
            narrow = x.float() @ Q.to(x.device).float()
            self.inputs[rows] = (narrow @ Q.T.to(x.device).float()).to(x.dtype)


def check_slicegpt(problem: Problem, *, multiple: int, last: Last, **_: Any) -> Expected:
    """Raises ConfigError for a model whose blocks are no chain of norm, sub-layer and sum, and for
    a ratio that cannot be met.
    """
    [hidden] = problem.groups(["hidden"])
    chain = stream(problem.model, hidden, problem.blocks())
    depth = sliced_blocks(chain, last)
    expected = expect(problem, [hidden])
    if expected.counts is not None:
        narrowed(problem, chain, hidden, depth, multiple, last)
    remark = "SliceGPT narrows the stream of the sliced blocks; its added matrices are not counted."
    return replace(expected, counts=None, remark=remark)


def sliced_blocks(chain: Stream, last: Last) -> int:
    """How many blocks are narrowed. Raises ConfigError where that is none."""
    depth = len(chain.blocks) - (last == "whole")
    if depth < 1:
        raise ConfigError(
            "slicegpt: last=whole leaves nothing of a model with one block; give last=output or "
            "last=sliced"
        )
    return depth


@pruners.register(
    paper="arXiv 2401.15024", year=2024, needs="data", out="self-contained", check=check_slicegpt
)
@torch.no_grad()
def slicegpt(
    problem: Problem,
    *,
    multiple: Positive = 8,
    weighting: Weighting = "signal",
    last: Last = "whole",
    store: Store = "memory",
    precision: Precision = "model",
) -> Pruned:
    """Narrows the residual stream to its principal directions, sub-layer by sub-layer, each on the
    output of the narrowed ones.

    Args:
        multiple: the width that stays is a multiple of this.
        weighting: `direction` gives every token the same weight in the covariance.
        last: `whole` leaves the last block and the output matrix at full width, `output` what the
            last sub-layer writes and the output matrix (the authors' code), `sliced` narrows up to
            the last norm.
        store: where activations between blocks wait.
        precision: of the forwards; sums are float32 or finer either way.

    With ratio.of=units the ratio is a share of the d channels (the paper's slicing); else the
    width is chosen so that as many parameters go as the ratio asked for, the added matrices
    counted. Tied embeddings stay tied. Raises ConfigError for a model whose blocks are no chain of
    RMSNorm, sub-layer and sum.
    """
    model, tokens = problem.model, problem.tokens
    [hidden] = problem.groups(["hidden"])
    if problem.allocate([hidden]).empty:
        return Pruned(model, {}, [], notes={"slicegpt": {"width": hidden.units}})
    chain = stream(model, hidden, problem.blocks())
    depth = sliced_blocks(chain, last)
    width = narrowed(problem, chain, hidden, depth, multiple, last)
    for part in (part for parts in chain.sublayers for part in parts):
        gain_and_eps(model.get_submodule(part.norm))  # refuses other norms before the long pass
    rests = output_forms(model, chain, tokens)
    # Small batches: capturing runs the whole model on two of them.
    options = PassOptions(store, precision, max(1, samples_at_once(tokens) // 4))
    inputs, feed = capture_inputs(model, chain.blocks, tokens, options)
    passage = Passage(model, chain, inputs, feed, rests)
    found = principal_bases(passage, depth, width, weighting, last)
    # Two a block, wide ones: they wait where the weights do.
    bases = [Q.cpu() if streaming(model) else Q for Q in turned(found)]
    before = Sizes(model, [hidden]).total
    assemble(model, chain, bases, depth)
    check_same_stream(passage, tokens, depth)
    sizes = {
        "channels": hidden.units,
        "width": width,
        "parameters_removed": before - Sizes(model, []).total,
    }
    return Pruned(model, {}, [], notes={"slicegpt": sizes})


def narrowed(
    problem: Problem, chain: Stream, hidden: Group, depth: int, multiple: int, last: Last
) -> int:
    """d': as many channels as are to stay, or the width whose parameters, added matrices included,
    come nearest to what the ratio asks for.
    """
    if multiple > hidden.units:
        raise ConfigError(f"pruner.multiple={multiple}: the residual stream has {hidden.units}")
    allocation = problem.allocate([hidden])
    wanted = allocation.counts[hidden.name]
    widths = range(multiple, hidden.units + 1, multiple)
    if allocation.budget == "units":
        return max((w for w in widths if w <= hidden.units - wanted), default=multiple)
    goal = Sizes(problem.model, [hidden]).removed({hidden.name: wanted})
    sizes = {w: removed(problem.model, chain, depth, w, last == "output") for w in widths}
    most = max(sizes.values())
    if most < goal:
        raise ConfigError(
            f"slicegpt: {goal} parameters cannot be removed, at most {most} (embeddings keep "
            "theirs); lower ratio.target"
        )
    return min(widths, key=lambda w: (abs(sizes[w] - goal), -w))


def principal_bases(
    passage: Passage, depth: int, width: int, weighting: Weighting, last: Last
) -> Iterator[Basis]:
    """Bases `(C, width)` of the stream before each sub-layer of the first `depth` blocks and after
    the last; the passage ends there, projected. With last=output there is none after it.
    """
    chain = passage.chain
    Q = directions(gram(passage.stream(), weighting), width)
    passage.project(Q)
    yield Q
    final = chain.sublayers[depth - 1][-1]
    for b in tqdm(range(depth), desc="bases of the residual stream", unit="block", delay=2):
        for part in chain.sublayers[b]:
            with turn(passage.model.get_submodule(chain.blocks[b])):
                after = passage.through(b, part)
                if last == "output" and part is final:
                    for _ in after:
                        pass
                    return
                Q = directions(gram(after, weighting), width)
            passage.project(Q)
            yield Q


def gram(pieces: Iterator[Tensor], weighting: Weighting) -> Tensor:
    """(C, C) float64: the sum of `x x^T` over the tokens of `pieces (n, T, C)`."""
    total = torch.zeros((), dtype=torch.float64)
    for x in pieces:
        x = x.flatten(0, 1).float()
        if weighting == "direction":
            x = x / x.norm(dim=1, keepdim=True).clamp_min(1e-12)
        total = total.to(x.device) + (x.T @ x).double()
    return total


def directions(gram: Tensor, width: int) -> Basis:
    """(C, width) float64: the eigenvectors of the largest eigenvalues."""
    ascending: Tensor = torch.linalg.eigh(gram).eigenvectors
    return ascending.flip(1)[:, :width]


def output_forms(model: nn.Module, chain: Stream, tokens: Tensor) -> Rests:
    """What follows the activation in the output of each sub-layer."""
    found: Rests = {}

    def see(name: str, _module: nn.Module, _args: Any, out: Any) -> None:
        found[name] = None if isinstance(out, Tensor) else (None,) * (len(out) - 1)

    names = [part.module for parts in chain.sublayers for part in parts]
    hooks = [model.get_submodule(n).register_forward_hook(partial(see, n)) for n in names]
    try:
        forward(model, tokens[:1, :8])
    finally:
        for hook in hooks:
            hook.remove()
    return found


def check_same_stream(passage: Passage, tokens: Tensor, depth: int) -> None:
    """Raises ConfigError unless the sliced model's stream is the projected stream of the model as
    it was.
    """
    model, chain, feed = passage.model, passage.chain, passage.feed
    rows = feed.rows[0]
    seen: list[Tensor] = []
    with hook_activations(model, inputs={(*chain.blocks, chain.norm)[depth]: seen.append}):
        forward(model, tokens[rows], head=False)
    projected = passage.inputs[rows]
    exact = projected.dtype in (torch.float32, torch.float64) and feed.precision == "model"
    want = projected.float()
    far = float((seen[0].to(want.device).float() - want).norm() / want.norm())
    if far > (1e-2 if exact else 0.2):
        name = type(model).__name__
        raise ConfigError(
            f"slicegpt: the rotated {name} does not compute the projected one ({far:.2g} apart): "
            "its blocks do more than add sub-layers"
        )
