"""SparseGPT (Frantar & Alistarh, ICML 2023, arXiv 2301.00774): single weights, unstructured or N:M,
the others of a row making up for them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from prunekit.activations.blockwise import Feeding, Store, inside, walk
from prunekit.activations.gram import Normal, warn_of_little_text
from prunekit.activations.moments import drain, samples_at_once, watch
from prunekit.activations.runs import WholeRun
from prunekit.architecture.matrices import block_names, fits, matrices, matrix, module_name, upright
from prunekit.errors import ConfigError
from prunekit.registry import Positive, pruners
from prunekit.selection.elements import Pattern, pattern
from prunekit.selection.eligible import spared
from prunekit.solvers.sparsegpt import inverse_factor, runs, spread, sweep
from prunekit.types import Counts, Group, Kept, Pruned, Run, Scores

Damp = Annotated[float, Field(ge=0)]


@pruners.register(paper="arXiv 2301.00774", year=2023, needs="data", out="zeros", kinds=())
@torch.no_grad()
def sparsegpt(
    model: nn.Module,
    tokens: Tensor,
    criterion: Callable[..., Scores] | None,
    ratio: Callable[..., Counts],
    exclude: Callable[[list[Group]], list[Group]],
    *,
    keep_n: Positive | None = None,
    block_m: Positive | None = None,
    block: Positive = 128,
    damp: Damp = 0.01,
    targets: list[str] | None = None,
    store: Store = "memory",
    precision: Literal["model", "bf16"] = "model",
) -> Pruned:
    """Zeroes elements of the linear matrices by their exact cost on the calibration text, and
    corrects the rest of each row.

    Elements go in blocks of `block` inputs, those with the least `w^2 / U_jj^2` of the block.
    `keep_n` of each `block_m` consecutive inputs stay (2:4 is keep_n=2 block_m=4); the ratio must
    agree, or decide (keep_n=null). `damp` is the ridge in units of the gram's mean diagonal; it
    grows, with a warning, where rounding leaves no Cholesky factor. Raises ConfigError where a
    pattern fits no matrix or ratio.
    """
    groups = spared(matrices(model, targets), exclude)
    asked = pattern(keep_n, block_m)
    if asked and block % asked.block_m:
        raise ConfigError(
            f"pruner.block={block} must be a multiple of pruner.block_m={asked.block_m}"
        )
    warn_of_little_text(tokens, max(matrix(model, g).shape[1] for g in groups))
    run = WholeRun(model, tokens)
    counts = ratio(model, groups, run)
    fits(model, groups, counts, asked)
    kept: Kept = {}
    costs: dict[str, float] = {}
    damped: dict[str, float] = {}
    if any(counts.values()):
        blocks = block_names(model)
        rows = inside(groups, blocks)
        for here in walk(
            model, blocks, tokens, Feeding(samples_at_once(run), store, precision == "bf16")
        ):
            row = [g for g in rows[here.block] if counts[g.name]]
            for mates, gram in grams(model, row, here) if row else ():
                U, took = inverse_factor(gram, damp, mates[0].name)
                for g in mates:
                    kept[g.name], costs[g.name] = operate(
                        model, g, gram, U, counts[g.name], asked, block
                    )
                    damped |= {g.name: took} if took != damp else {}
    gone = {name: int((~mask).sum()) for name, mask in kept.items()}
    return Pruned(model, kept, groups, {}, {"counts": gone, "costs": costs, "more_damping": damped})


def operate(
    model: nn.Module,
    g: Group,
    gram: Tensor,
    U: Tensor,
    count: int,
    asked: Pattern | None,
    block: int,
) -> tuple[Tensor, float]:
    """Sweep one matrix in place. Returns the mask, stored like the matrix, and the cost."""
    W = matrix(model, g)
    choice = (
        runs(asked.kept_of(count, g.units, g.name), asked.block_m)
        if asked
        else spread(count, W.shape[1], block)
    )
    new, mask, cost = sweep(
        W.float(), U.to(W.device, torch.float32), choice, block, gram.diagonal().to(W.device) == 0
    )
    W.copy_(new.to(W).masked_fill_(~mask, 0))
    return upright(model, g, mask).contiguous(), cost


class Shared:
    """Gram matrices of several modules' inputs; modules that are shown the same tensor (q, k and v)
    share one.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Normal] = {}
        self.owner: dict[str, str] = {}
        self.last: tuple[str, Tensor] | None = None

    def see(self, name: str, x: Tensor) -> None:
        """Take in `x (..., inputs)` of module `name`. The last tensor is held, so that its memory
        cannot become another one's.
        """
        if name not in self.owner:
            same = (
                self.last is not None
                and self.last[1].data_ptr() == x.data_ptr()
                and self.last[1].shape == x.shape
            )
            self.owner[name] = self.last[0] if same and self.last else name
        if self.owner[name] == name:
            self.sums.setdefault(name, Normal(x.shape[-1], 0, x.device)).add(x)
            self.last = (name, x)


def grams(model: nn.Module, groups: list[Group], run: Run) -> list[tuple[list[Group], Tensor]]:
    """Groups that read the same input, and the mean of `x x^T` over the tokens of that input; one
    pass of the block.

    Raises ConfigError for a module that no token reaches: it has no input to go by.
    """
    shared = Shared()
    with watch(model, inputs={module_name(g): partial(shared.see, module_name(g)) for g in groups}):
        drain(run, "inputs")
    mates: dict[str, list[Group]] = {}
    for g in groups:
        name = module_name(g)
        if name not in shared.owner:
            raise ConfigError(
                f"no calibration token reaches {name} (an idle expert?): calibrate on more text, "
                "or narrow pruner.targets"
            )
        mates.setdefault(shared.owner[name], []).append(g)
    return [(row, shared.sums[name].gram / shared.sums[name].tokens) for name, row in mates.items()]
