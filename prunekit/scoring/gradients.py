"""Gradients handed over weight by weight as backward produces them, and freed: scoring never holds
a model's worth of them.

Backward visits the layers from the last to the first. Each weight's gradient is given to a callback
the moment it is complete and is dropped when the callback returns, so the memory needed beside the
weights is one weight's gradient plus the activations, and of those only matrix products are kept;
the rest is recomputed (see `lean_backward`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from prunekit.activations import processes
from prunekit.activations.runs import samples_at_once
from prunekit.architecture.blocks import block_modules
from prunekit.architecture.linear import is_linear
from prunekit.architecture.mapped import release
from prunekit.architecture.matrices import shared_parameters
from prunekit.errors import ConfigError
from prunekit.scoring.loss_scale import loss_scale, unscaled
from prunekit.types import Run, tensor_of

Sink = Callable[[str, Tensor, Tensor, Tensor | None], None]
"""`sink(name, weight, gradient, mean_squared)`: the last is the mean over samples of the squared
per-sample gradient, or None.
"""

TOKENS = 2048
"""Tokens of a backward where the caller names no batch: the setting of most papers is less, and
more would cost gigabytes.
"""


@contextmanager
def only_these_train(model: nn.Module, names: set[str]) -> Iterator[None]:
    """Inside, exactly the parameters `names` require gradients, and none holds one; flags and
    gradients are restored after.
    """
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    held = {n: p.grad for n, p in model.named_parameters()}
    try:
        for n, p in model.named_parameters():
            p.requires_grad_(n in names)
            p.grad = None
        yield
    finally:
        for n, p in model.named_parameters():
            p.requires_grad_(flags[n])
            p.grad = held[n]


def gradient_of(x: Tensor) -> Tensor:
    """Zeros where no backward reached `x`."""
    return torch.zeros_like(x) if x.grad is None else x.grad


def check_in_memory(model: nn.Module, names: Iterable[str]) -> None:
    """Raises ConfigError for a weight that accelerate keeps elsewhere."""
    missing = [n for n in names if tensor_of(model, n).is_meta]
    if missing:
        raise ConfigError(
            f"gradients need every weight in memory, and {missing[0]} is not: "
            "prunekit.architecture.offload.gather(model) brings them"
        )


def backward(
    model: nn.Module,
    names: Iterable[str],
    run: Run,
    sink: Sink,
    *,
    squares: bool,
    batch: int | None = None,
) -> None:
    """One backward of the batch's mean loss; every weight in `names` goes through `sink` once, as
    soon as it is known. A weight that no token reached has a gradient of zeros.

    Args:
        squares: adds the mean over samples of squared per-sample gradients. For linear layers that
            see every token they come out of the same single backward, from the layer's input and
            output gradient; other weights (norms, embeddings, routed experts) take one extra
            backward a sample.
        batch: samples at a time (None: as many as make up `TOKENS` tokens): where that splits them,
            the sums over the batches take as much memory as the weights in `names`, with `squares`
            twice as much, in float32. Weights that go sample by sample do so in any case.

    Of several processes each takes a part of the samples, unless `squares`, and gradients are added
    up at the end (as much memory as the weights in `names`). Raises ConfigError where accelerate
    keeps a weight elsewhere.
    """
    wanted, scale = list(dict.fromkeys(names)), loss_scale(model)
    check_in_memory(model, wanted)

    def deliver(name: str, weight: Tensor, gradient: Tensor, mean_squared: Tensor | None) -> None:
        with torch.no_grad():
            second = None if mean_squared is None else unscaled(mean_squared, scale**2)
            sink(name, weight, unscaled(gradient, scale), second)
            release([weight])

    total = len(run.tokens)
    at_once = batch or samples_at_once(run.tokens, TOKENS)
    with torch.enable_grad():
        if not squares:
            with only_these_train(model, set(wanted)), _Progress(model, total, at_once) as progress:
                _whole_batch(model, wanted, run, deliver, at_once, progress)
            return
        owners = _linear_owners(model, wanted)
        done: set[str] = set()
        if owners:
            with (
                only_these_train(model, set()),
                _Progress(model, total, at_once) as progress,
                _per_sample(owners, deliver, run.tokens, progress, done),
            ):
                for out in run.losses(at_once):
                    (out.loss * scale).backward()
                    progress.done()
        others = [n for n in wanted if n not in done]
        if others:
            with only_these_train(model, set(others)), _Progress(model, total, 1) as progress:
                _sample_by_sample(model, others, run, deliver, progress)


class _Progress:
    """A bar over samples that moves with each block that a batch of them has passed, forwards and
    backwards: a batch takes from seconds to minutes.
    """

    FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total} samples [{elapsed}<{remaining}]"
    FORWARD = 1 / 3
    """Share of the work that a forward is."""

    def __init__(self, model: nn.Module, samples: int, at_once: int):
        self.blocks, self.samples, self.at_once = block_modules(model), samples, at_once
        self.finished = 0

    @property
    def size(self) -> int:
        """Samples of the batch that is on its way."""
        return min(self.at_once, self.samples - self.finished)

    def __enter__(self) -> _Progress:
        self.bar = tqdm(total=self.samples, desc="gradients", bar_format=self.FORMAT, leave=False)
        self.hooks = [b.register_forward_hook(self._forward) for b in self.blocks]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()
        self.bar.close()

    def _forward(self, block: nn.Module, args: Any, out: Any) -> None:
        self._passed(self.FORWARD)
        first = out[0] if isinstance(out, (tuple, list)) else out
        if isinstance(first, Tensor) and first.requires_grad:
            first.register_hook(lambda _: self._passed(1 - self.FORWARD))

    def _passed(self, share: float) -> None:
        # What is recomputed in a backward passes again: never beyond the batch.
        most = self.finished + self.size - self.bar.n
        self.bar.update(max(0.0, min(share * self.size / len(self.blocks), most)))

    def done(self) -> None:
        """The batch went forward and backward."""
        self.finished += self.size
        self.bar.update(self.finished - self.bar.n)


def _whole_batch(
    model: nn.Module, names: list[str], run: Run, sink: Sink, batch: int, progress: _Progress
) -> None:
    total = len(run.tokens)
    mine = processes.own_part(run)
    share = len(mine.tokens)
    batches = -(-share // batch)
    seen = 0
    waiting = dict.fromkeys(names)

    def fold(name: str, p: Tensor) -> None:
        if seen == batches and processes.count() == 1:
            assert p.grad is not None
            sink(name, p, p.grad, None)
            p.grad = None
            del waiting[name]

    hooks = [
        tensor_of(model, n).register_post_accumulate_grad_hook(partial(fold, n)) for n in names
    ]
    try:
        for out in mine.losses(batch):
            seen += 1
            size = min(batch, share - (seen - 1) * batch)
            # The mean over all N samples, whatever the size of the last batch.
            (out.loss * (size / total * loss_scale(model))).backward()
            progress.done()
    finally:
        for h in hooks:
            h.remove()
    # The last batch did not reach them (experts that had no token), or other processes add theirs.
    for name in list(waiting):
        p = tensor_of(model, name)
        gradient = gradient_of(p)
        processes.add_up([gradient])
        sink(name, p, gradient, None)
        p.grad = None


def _sample_by_sample(
    model: nn.Module, names: list[str], run: Run, sink: Sink, progress: _Progress
) -> None:
    params = {n: tensor_of(model, n) for n in names}
    mean = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in params.items()}
    squared = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in params.items()}
    total = len(run.tokens)
    for out in run.losses(1):
        (out.loss * loss_scale(model)).backward()
        for n, p in params.items():
            if p.grad is not None:
                g = p.grad.float()
                mean[n] += g / total
                squared[n] += g.square() / total
                p.grad = None
        progress.done()
    for n, p in params.items():
        sink(n, p, mean.pop(n), squared.pop(n))


def _linear_owners(model: nn.Module, names: list[str]) -> dict[str, nn.Module]:
    """Names of weights that only one linear module applies."""
    shared, wanted = shared_parameters(model), set(names)
    found = {}
    for prefix, module in model.named_modules():
        name = f"{prefix}.weight"
        if name in wanted and is_linear(module) and id(module.weight) not in shared:
            found[name] = module
    return found


@contextmanager
def _per_sample(
    owners: dict[str, nn.Module], sink: Sink, tokens: Tensor, progress: _Progress, done: set[str]
) -> Iterator[None]:
    """Inside, each backward through a linear layer turns its input and output gradient into that
    weight's per-sample gradients; `done` collects the names. A layer that sees other rows than all
    tokens of each batch (an expert behind a router) is left out: its rows do not tell their sample.

    The loss of a batch is a mean over its n equally long samples, so the gradient of one alone is n
    times its share: with `x (n, T, in)` and `d (n, T, out)`, `G_i = n * d_i^T x_i`, the gradient is
    the mean of G_i over all N samples and the second moment that of G_i^2.
    """
    total, length = tokens.shape
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    samples_seen = dict.fromkeys(owners, 0)

    def on_forward(name: str, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        x = args[0].detach()
        if not out.requires_grad:
            out.requires_grad_()  # nothing below trains: the graph starts here
        size = progress.size
        missed = samples_seen[name] < progress.finished
        if missed or x.numel() != size * length * x.shape[-1]:
            sums.pop(name, None)
            return

        def on_backward(d: Tensor) -> None:
            weight: Tensor = module.weight  # type: ignore[assignment]
            if name not in sums:
                zeros = torch.zeros_like(weight, dtype=torch.float32)
                sums[name] = zeros, zeros.clone()
            gradient, squared = sums[name]
            a, b = (d, x) if isinstance(module, nn.Linear) else (x, d)  # Conv1D stores (in, out)
            a, b = (t.reshape(size, -1, t.shape[-1]) for t in (a, b))
            for a_n, b_n in zip(a, b, strict=True):
                g = (a_n.T @ b_n).float()
                gradient.add_(g, alpha=size / total)
                squared.addcmul_(g, g, value=size * size / total)
            samples_seen[name] = progress.finished + size
            if samples_seen[name] == total:
                done.add(name)
                sink(name, weight, *sums.pop(name))

        out.register_hook(on_backward)

    hooks = [m.register_forward_hook(partial(on_forward, n)) for n, m in owners.items()]
    try:
        yield
    finally:
        for h in hooks:
            h.remove()
