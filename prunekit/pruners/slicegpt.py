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

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from prunekit import graph
from prunekit.activations.blockwise import Activations, Feed, Feeding, Store, capture, stack
from prunekit.activations.moments import samples_at_once, watch
from prunekit.activations.runs import WholeRun
from prunekit.architecture.linear import weight_of
from prunekit.architecture.residual import Stream, Sublayer, gain_and_eps, stream
from prunekit.architecture.sizes import Sizes
from prunekit.errors import ConfigError
from prunekit.registry import Positive, pruners
from prunekit.scoring.block_ablation import returning
from prunekit.selection.eligible import of_kinds, spared
from prunekit.solvers.rotation import Basis, assemble, removed, turned
from prunekit.types import Counts, Group, Pruned, Scores

Weighting = Literal["signal", "direction"]
Rests = dict[str, tuple[Any, ...] | None]
"""sub-layer -> what follows the activation in its output, None for a bare tensor."""


@pruners.register(paper="arXiv 2401.15024", year=2024, out="self-contained", kinds=())
@torch.no_grad()
def slicegpt(
    model: nn.Module,
    tokens: Tensor,
    criterion: Callable[..., Scores] | None,
    ratio: Callable[..., Counts],
    exclude: Callable[[list[Group]], list[Group]],
    *,
    budget: Literal["units", "prunable", "model"] = "model",
    multiple: Positive = 8,
    weighting: Weighting = "signal",
    last: Literal["whole", "sliced"] = "whole",
    store: Store = "memory",
    precision: Literal["model", "bf16"] = "model",
    verify: bool = True,
) -> Pruned:
    """Narrows the residual stream to its principal directions, sub-layer by sub-layer, each on the
    output of the narrowed ones.

    `budget=units`: the ratio is a share of the d channels (the paper's slicing); else d' is chosen
    so that as many parameters go as the ratio asked for, the added matrices counted. `multiple`
    rounds d'. `weighting=direction` gives every token the same weight. `last=whole` leaves the last
    block and the output matrix at full width, `sliced` narrows up to the last norm. `store` says
    where activations wait, `precision=bf16` runs the forwards in bfloat16; sums are float32 or
    finer either way. Tied embeddings stay tied. Raises ConfigError for a model whose blocks are no
    chain of RMSNorm, sub-layer and sum.
    """
    groups = graph.discover(model, verify=verify)
    [hidden] = spared(of_kinds(model, groups, ["hidden"]), exclude)
    chain = stream(model, hidden, stack(groups))
    depth = len(chain.blocks) - (last == "whole")
    if depth < 1:
        raise ConfigError(
            "slicegpt: last=whole leaves nothing of a model with one block; give last=sliced"
        )
    run = WholeRun(model, tokens)
    wanted = ratio(model, [hidden], run)[hidden.name]
    width = narrowed(model, chain, hidden, wanted, depth, budget, multiple)
    for part in (part for parts in chain.sublayers for part in parts):
        gain_and_eps(model.get_submodule(part.norm))  # refuses other norms before the long pass
    rests = forms(model, chain, tokens)
    # Small batches: capturing runs the whole model on two of them.
    inputs, feed = capture(
        model,
        chain.blocks,
        tokens,
        Feeding(max(1, samples_at_once(run) // 4), store, precision == "bf16"),
    )
    bases = list(turned(principal(model, chain, feed, inputs, depth, width, weighting, rests)))
    before = Sizes(model, [hidden]).total
    assemble(model, chain, bases, depth)
    same(model, chain, tokens, inputs, feed, depth)
    sizes = {
        "channels": hidden.units,
        "width": width,
        "parameters_removed": before - Sizes(model, []).total,
    }
    return Pruned(model, {}, [], notes={"slicegpt": sizes})


def narrowed(
    model: nn.Module,
    chain: Stream,
    hidden: Group,
    wanted: int,
    depth: int,
    budget: str,
    multiple: int,
) -> int:
    """d': as many channels as are to stay, or the width whose parameters, added matrices included,
    come nearest to that request.
    """
    widths = range(multiple, hidden.units + 1, multiple)
    if budget == "units":
        return max((w for w in widths if w <= hidden.units - wanted), default=multiple)
    goal = Sizes(model, [hidden]).removed({hidden.name: wanted})
    sizes = {w: removed(model, chain, depth, w) for w in widths}
    most = max(sizes.values())
    if most < goal:
        raise ConfigError(
            f"slicegpt: {goal} parameters cannot be removed, at most {most} (embeddings keep "
            "theirs); lower ratio.target"
        )
    return min(widths, key=lambda w: (abs(sizes[w] - goal), -w))


def principal(
    model: nn.Module,
    chain: Stream,
    feed: Feed,
    inputs: Activations,
    depth: int,
    width: int,
    weighting: Weighting,
    rests: Rests,
) -> Iterator[Basis]:
    """Bases `(C, width)` of the stream before each sub-layer of the first `depth` blocks and after
    the last; `inputs` ends projected.
    """

    def gram(pieces: Iterator[Tensor]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for x in pieces:
            x = x.flatten(0, 1).float()
            if weighting == "direction":
                x = x / x.norm(dim=1, keepdim=True).clamp_min(1e-12)
            total = total.to(x.device) + (x.T @ x).double()
        return total

    def project(Q: Basis) -> None:
        for rows in feed.rows:
            x = inputs[rows]
            inputs[rows] = (x.float() @ Q.to(x.device).float() @ Q.T.to(x.device).float()).to(
                x.dtype
            )

    Q = directions(gram(inputs[rows] for rows in feed.rows), width)
    project(Q)
    yield Q
    for b in tqdm(range(depth), desc="bases of the residual stream", unit="block", delay=2):
        for part in chain.sublayers[b]:
            Q = directions(gram(through(model, chain, feed, inputs, b, part, rests)), width)
            project(Q)
            yield Q


def directions(gram: Tensor, width: int) -> Basis:
    """(C, width) float64: the eigenvectors of the largest eigenvalues."""
    return torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :width]


def through(
    model: nn.Module,
    chain: Stream,
    feed: Feed,
    inputs: Activations,
    b: int,
    part: Sublayer,
    rests: Rests,
) -> Iterator[Tensor]:
    """The stream after one sub-layer of block `b`, batch by batch; it replaces `inputs`."""
    block = model.get_submodule(chain.blocks[b])
    nothing = torch.zeros_like(weight_of(model.get_submodule(part.writers[0]))[0, 0])
    with ExitStack() as others:
        for other in chain.sublayers[b]:
            if other is not part:
                others.enter_context(
                    returning(model.get_submodule(other.module), nothing, rests[other.module])
                )
        for i, rows in enumerate(feed.rows):
            x = feed.forward(block, b, i, inputs[rows])
            inputs[rows] = x
            yield x


def forms(model: nn.Module, chain: Stream, tokens: Tensor) -> Rests:
    """What follows the activation in the output of each sub-layer: None where it is a
    bare tensor.
    """
    found: Rests = {}

    def see(name: str, _module: nn.Module, _args: Any, out: Any) -> None:
        found[name] = None if isinstance(out, Tensor) else (None,) * (len(out) - 1)

    names = [part.module for parts in chain.sublayers for part in parts]
    hooks = [model.get_submodule(n).register_forward_hook(partial(see, n)) for n in names]
    try:
        next(WholeRun(model, tokens[:1, :8])())
    finally:
        for hook in hooks:
            hook.remove()
    return found


def same(
    model: nn.Module, chain: Stream, tokens: Tensor, inputs: Activations, feed: Feed, depth: int
) -> None:
    """Raises ConfigError unless the sliced model's stream is the projected stream of the model as
    it was.
    """
    rows = feed.rows[0]
    seen: list[Tensor] = []
    with watch(model, inputs={(*chain.blocks, chain.norm)[depth]: seen.append}):
        next(WholeRun(model, tokens[rows])(head=False))
    want = inputs[rows].float()
    far = float((seen[0].float() - want).norm() / want.norm())
    if far > (
        1e-2 if inputs[rows].dtype in (torch.float32, torch.float64) and not feed.bf16 else 0.2
    ):
        name = type(model).__name__
        raise ConfigError(
            f"slicegpt: the rotated {name} does not compute the projected one ({far:.2g} apart): "
            "its blocks do more than add sub-layers"
        )
