"""Kronecker-factored curvature of linear modules (K-FAC, Martens & Grosse, 2015; LLM Surgeon, van
der Ouderaa et al., ICLR 2024, arXiv 2312.17244, section 3.1).

The Fisher matrix of the weights of `y = W x` is about `E[g g^T] (x) E[x x^T]`, with `g` the
gradient of the text's loss at `y`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from prunekit.activations.runs import samples_at_once
from prunekit.activations.sharing import places_of, watched
from prunekit.architecture.blocks import block_modules
from prunekit.scoring.gradients import TOKENS, check_in_memory, only_these_train
from prunekit.scoring.lean_backward import lean_activations, lean_loss
from prunekit.types import Run

Place = Literal["host", "device"]
"""Where sums wait while the text goes through: in host memory, or beside the model's weights."""


class Factors:
    """Sums over the tokens that a linear module saw, float32 at `place`.

    Attributes:
        gram: `(inputs + 1, inputs + 1)`, sum of `x x^T` with a 1 behind the inputs, that of the
            bias.
        gradient: `(outputs, outputs)`, sum of `g g^T`.
        seen: tokens in the sums; experts do not see all.
        tokens: of the text.
    """

    def __init__(self, inputs: int, outputs: int, place: torch.device | str, tokens: int):
        self.gram = torch.zeros(inputs + 1, inputs + 1, device=place)
        self.gradient = torch.zeros(outputs, outputs, device=place)
        self.seen, self.tokens = 0, tokens

    def add(self, x: Tensor, g: Tensor) -> None:
        """Take in inputs `x (..., inputs)` and gradients `g (..., outputs)` at the outputs."""
        g = g.reshape(-1, g.shape[-1]).float()
        x = x.reshape(-1, x.shape[-1]).float()
        x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        self.gram += (x.T @ x).to(self.gram.device)
        self.gradient += (g.T @ g).to(self.gradient.device)
        self.seen += len(x)

    def inputs(self, affine: bool) -> Tensor:
        """Mean of `x x^T` over the tokens seen; with `affine` the bias's 1 is the last input."""
        gram = self.gram if affine else self.gram[:-1, :-1]
        return gram / max(1, self.seen)

    def outputs(self) -> Tensor:
        """Sum of `g g^T` over the tokens of the text: quadratic forms are then in nats a token."""
        return self.gradient / self.tokens


def kronecker_factors(
    model: nn.Module,
    names: Iterable[str],
    run: Run,
    *,
    batch: int | None = None,
    place: Place = "host",
) -> dict[str, Factors]:
    """Both factors of the linear modules `names`, and of the others that use their matrices, on the
    run's text, in one backward a batch; no weight's gradient is computed.

    Args:
        batch: samples at a time; None takes as many as make up `TOKENS` tokens.
        place: of the sums, `inputs^2 + outputs^2` numbers a module.

    A module that no token reaches has zeros. Raises ConfigError where accelerate keeps a weight
    elsewhere.
    """
    names = list(names)
    check_in_memory(model, [f"{name}.weight" for name in names])
    samples, predicted = len(run.tokens), run.tokens.shape[1] - 1
    at_once = batch or samples_at_once(run.tokens, TOKENS)
    factors: dict[str, Factors] = {}
    shown: list[tuple[nn.Module, Factors]] = []
    for name, places in places_of(model, names).items():
        module = model.get_submodule(name)
        rows, columns = module.weight.shape  # type: ignore[misc]
        outputs, inputs = (rows, columns) if isinstance(module, nn.Linear) else (columns, rows)
        where = "cpu" if place == "host" else module.weight.device
        factors[name] = Factors(inputs, outputs, where, samples * predicted)  # type: ignore[arg-type]
        shown += [(model.get_submodule(n), factors[name]) for n in watched(model, places)]
    with (
        torch.enable_grad(),
        only_these_train(model, set()),
        lean_activations(block_modules(model)),
        lean_loss(model),
        _watched(shown),
        tqdm(total=samples, desc="curvature", unit="sample", leave=False) as bar,
    ):
        losses = run.losses(at_once)
        for i in range(0, samples, at_once):
            size = min(at_once, samples - i)
            out = next(losses)
            (out.loss * (size * predicted)).backward()  # of the sum: tokens do not share it
            del out  # and with it the inputs that its hooks hold, before the next forward
            bar.update(size)
    return factors


@contextmanager
def _watched(shown: Iterable[tuple[nn.Module, Factors]]) -> Iterator[None]:
    """Inside, each backward through a module adds to the factors beside it. Inputs are added there
    too: a block that recomputes its forward shows them twice.
    """

    def on_forward(
        factors: Factors, module: nn.Module, args: tuple[Tensor, ...], out: Tensor
    ) -> Tensor | None:
        first = not out.requires_grad  # nothing below trains: the graph starts here
        if first:
            out = out.requires_grad_().clone()  # Falcon adds to it in place, which no leaf allows
        out.register_hook(partial(on_backward, factors, args[0].detach()))
        return out if first else None

    def on_backward(factors: Factors, x: Tensor, g: Tensor) -> None:
        with torch.no_grad():
            factors.add(x, g)

    hooks = [m.register_forward_hook(partial(on_forward, f)) for m, f in shown]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
