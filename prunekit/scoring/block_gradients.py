"""Gradients of a model that does not fit into memory: the text goes forward block by block, what
each block read waits in a store, and from the loss back each block runs once more and is
differentiated alone.

At work are one block, its gradients, and the activations of one batch in it. The ends of the model
(embedding and norm, output matrix and loss) run in its own forward, the blocks left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from prunekit.activations import processes
from prunekit.activations.block_inputs import capture_inputs
from prunekit.activations.hooks import first_tensor
from prunekit.activations.runs import forward, samples_at_once
from prunekit.activations.storage import Activations, PassOptions, Store
from prunekit.architecture.blocks import block_names
from prunekit.architecture.mapped import mapped, release
from prunekit.architecture.streaming import outside_blocks, streaming, turn
from prunekit.errors import ConfigError
from prunekit.scoring.gradients import (
    TOKENS,
    Sink,
    backward,
    check_in_memory,
    gradient_of,
    only_these_train,
)
from prunekit.scoring.left_out import check_alone, left_out, like, tensors_in, without_first
from prunekit.scoring.loss_scale import loss_scale, unscaled
from prunekit.types import Run, tensor_of


def gradients(
    model: nn.Module,
    names: Iterable[str],
    run: Run,
    sink: Sink,
    *,
    squares: bool,
    batch: int | None = None,
    by_block: bool | None = None,
    store: Store = "memory",
) -> None:
    """`backward`, or the same block by block.

    Args:
        by_block: None where the model's weights lie on disk, or come to a device block by block.
        store: where the inputs of the blocks wait, by block.
    """
    away = mapped(model) or streaming(model) is not None
    if away if by_block is None else by_block:
        backward_by_block(model, names, run, sink, squares=squares, batch=batch, store=store)
    else:
        backward(model, names, run, sink, squares=squares, batch=batch)


def backward_by_block(
    model: nn.Module,
    names: Iterable[str],
    run: Run,
    sink: Sink,
    *,
    squares: bool,
    batch: int | None = None,
    store: Store = "memory",
) -> None:
    """What `gradients.backward` does, with the memory of one block and its gradients beside the
    activations between the blocks, `(L + 1) N T C` numbers in `store`. Weights outside the blocks
    are handed over last; their gradients wait until then.

    Args:
        squares: samples go one by one then, in every process all of them.
        batch: samples at a time (None: as many as make up `TOKENS` tokens). Gradients of several
            add up in the dtype of the weights.

    Raises ConfigError for a model whose blocks hand each other more than the residual stream, and
    with `squares` for weights outside the blocks.
    """
    wanted = list(dict.fromkeys(names))
    check_in_memory(model, wanted)
    work = _ByBlock(model, wanted, run, sink, squares, batch, store)
    with only_these_train(model, set(wanted)):
        work.forward()
        ends = outside_blocks(model)
        with turn(*ends if work.outside else ()):  # their gradients wait there
            with turn(*ends):
                work.loss()
            last_first = range(len(work.blocks) - 1, work.lowest - 1, -1)
            for b in tqdm(last_first, desc="gradients", unit="block", leave=False):
                with turn(work.modules[b]):
                    work.block(b)
            if work.outside:
                work.embedding()


class _ByBlock:
    """The steps of `backward_by_block`."""

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        run: Run,
        sink: Sink,
        squares: bool,
        batch: int | None,
        store: Store,
    ):
        self.model, self.tokens, self.sink, self.store = model, run.tokens, sink, store
        self.squares, self.batch = squares, 1 if squares else batch
        self.scale = loss_scale(model)
        self.blocks = block_names(model)
        self.modules = [model.get_submodule(b) for b in self.blocks]
        self.names: list[list[str]] = [[] for _ in self.blocks]
        self.outside: list[str] = []
        for name in names:
            home = (i for i, b in enumerate(self.blocks) if name.startswith(f"{b}."))
            at = next(home, None)
            (self.outside if at is None else self.names[at]).append(name)
        if self.outside and squares:
            raise ConfigError(
                "squared gradients block by block are those of weights inside the blocks, and "
                f"{self.outside[0]} is not: give criterion.by_block=false, a first-order mode, or "
                "other pruner.kinds"
            )
        with_names = [b for b, names in enumerate(self.names) if names]
        self.lowest = 0 if self.outside else min(with_names, default=len(self.blocks))
        self.forms: list[Any] = []
        """What each block puts out beside the hidden state: see `like`."""

    @torch.no_grad()
    def forward(self) -> None:
        """Fills `inputs`: what each block reads, and what the last one puts out."""
        options = PassOptions(
            self.store, "model", self.batch or samples_at_once(self.tokens, TOKENS)
        )
        first, self.feed = capture_inputs(self.model, self.blocks, self.tokens, options)
        numbered = list(enumerate(self.feed.rows))
        self.rows = numbered if self.squares else processes.own(numbered)
        self.inputs = [first]
        like = first[slice(0, 1)]
        for b, module in enumerate(
            tqdm(self.modules, desc="activations", unit="block", leave=False)
        ):
            following = Activations(len(self.tokens), like, self.store)
            with turn(module):
                for i, rows in self.rows:
                    args, kwargs = self.feed.calls[b][i]
                    out = module(self.inputs[b][rows], *args, **kwargs)
                    following[rows] = first_tensor(out)
                    if b == len(self.forms):
                        self.forms.append(without_first(out))
            self.inputs[b].release()
            self.inputs.append(following)
        check_alone(self.blocks, self.forms, self.feed, self.rows[0][0])

    def loss(self) -> None:
        """The loss of each batch, and its gradient in the place of what the last block put out."""
        ends = self.inputs[-1]
        for _, rows in self.rows:
            x = ends[rows].requires_grad_()
            with torch.enable_grad(), left_out(self.modules, partial(self._through, x)):
                loss = forward(self.model, self.tokens[rows], labels=True).loss
                (loss * (self._share(rows) * self.scale)).backward()
            ends[rows] = gradient_of(x)
        self._release_ends()

    def _through(self, end: Tensor, number: int, x: Tensor, _rest: Any) -> Any:
        last = number == len(self.blocks) - 1
        return like(self.forms[number], end if last else x)

    def _share(self, rows: slice) -> float:
        """Of a batch's mean loss in that over all samples; of squares each sample counts whole."""
        return 1.0 if self.squares else (rows.stop - rows.start) / len(self.tokens)

    def block(self, b: int) -> None:
        """Gradients of a block's weights to the sink, that of its input in the input's place."""
        module, names = self.modules[b], self.names[b]
        samples = len(self.tokens)
        sums = _Squares(self.model, names, samples, self.scale) if self.squares else None
        needs_input = b > self.lowest or bool(self.outside)
        for i, rows in self.rows:
            x = self.inputs[b][rows].requires_grad_(needs_input)
            with torch.enable_grad():
                out = self.feed.forward(module, b, i, x)
                torch.autograd.backward([out], [self.inputs[b + 1][rows].to(out)])
            del out
            if needs_input:
                self.inputs[b][rows] = gradient_of(x)
            if sums:
                sums.add()
        self.inputs.pop()
        self._deliver(names, sums)
        release(module.parameters())

    def embedding(self) -> None:
        """Gradients of what stands outside the blocks: those of the loss are there already."""
        for _, rows in self.rows:
            got: list[Tensor] = []
            with torch.enable_grad(), left_out(self.modules, partial(self._caught, got)):
                forward(self.model, self.tokens[rows], head=False)
                if got[0].requires_grad:
                    torch.autograd.backward([got[0]], [self.inputs[0][rows].to(got[0])])
        self._deliver(self.outside, None)
        self._release_ends()

    def _caught(self, got: list[Tensor], number: int, x: Tensor, rest: Any) -> Any:
        if any(t.requires_grad for t in tensors_in(rest)):
            raise ConfigError(
                f"{self.blocks[number]} reads more of what stands before the blocks than the "
                f"residual stream: the gradient of {self.outside[0]} cannot be taken block by "
                "block; give criterion.by_block=false, or other pruner.kinds"
            )
        got.append(x)
        return like(self.forms[number], x.detach())

    @torch.no_grad()
    def _deliver(self, names: Sequence[str], sums: _Squares | None) -> None:
        for name in names:
            p = tensor_of(self.model, name)
            if sums:
                self.sink(name, p, *sums.of(name))
                continue
            gradient = unscaled(gradient_of(p), self.scale)
            processes.add_up([gradient])
            self.sink(name, p, gradient, None)
            p.grad = None

    def _release_ends(self) -> None:
        inside = tuple(f"{b}." for b in self.blocks)
        release(p for n, p in self.model.named_parameters() if not n.startswith(inside))


class _Squares:
    """Means over samples of gradients and of their squares, from one backward a sample."""

    def __init__(self, model: nn.Module, names: Sequence[str], samples: int, scale: float):
        self.params = {n: tensor_of(model, n) for n in names}
        self.samples, self.scale = samples, scale
        self.sums = {
            n: (torch.zeros_like(p, dtype=torch.float32), torch.zeros_like(p, dtype=torch.float32))
            for n, p in self.params.items()
        }

    def add(self) -> None:
        """Takes the sample's gradients from the weights."""
        for name, p in self.params.items():
            if p.grad is not None:
                mean, squared = self.sums[name]
                g = unscaled(p.grad, self.scale).float()
                mean.add_(g, alpha=1 / self.samples)
                squared.addcmul_(g, g, value=1 / self.samples)
                p.grad = None

    def of(self, name: str) -> tuple[Tensor, Tensor]:
        return self.sums.pop(name)
