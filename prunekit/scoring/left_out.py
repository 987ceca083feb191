"""A model's own forward with its blocks left out, and whether blocks can be taken alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.activations.block_inputs import BlockInputs
from prunekit.activations.hooks import first_tensor
from prunekit.architecture.modes import forward_replaced
from prunekit.architecture.streaming import without_weights
from prunekit.errors import ConfigError


@contextmanager
def left_out(
    blocks: Sequence[nn.Module], answer: Callable[[int, Tensor, Any], Any]
) -> Iterator[None]:
    """Inside, block number `i` is not run: `answer(i, x, rest)` stands for what it puts out, with
    the hidden state and the other arguments that it was called with.
    """

    def stand_in(number: int, *args: Any, **kwargs: Any) -> Any:
        rest = [*args[1:], *(v for k, v in kwargs.items() if args or k != "hidden_states")]
        return answer(number, first_tensor(args, kwargs), rest)

    with ExitStack() as stack:
        for number, block in enumerate(blocks):
            stand = without_weights(partial(stand_in, number))
            stack.enter_context(forward_replaced(block, stand))
        yield


def like(form: Any, x: Tensor) -> Any:
    """`x` as a block hands it on: alone where `form` is None, else in the place of its first."""
    return x if form is None else type(form)([x, *form[1:]])


def without_first(out: Any) -> Any:
    return None if isinstance(out, Tensor) else type(out)([None, *out[1:]])


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from tensors_in(one)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def check_alone(blocks: Sequence[str], forms: Sequence[Any], feed: BlockInputs, batch: int) -> None:
    """Raises ConfigError where a block reads what an earlier one put out beside its first tensor:
    gradients pass there too.
    """
    for b, form in enumerate(forms):
        beside = list(tensors_in(form))
        for later in range(b + 1, len(blocks) if beside else 0):
            for read in tensors_in(list(feed.calls[later][batch])):
                if any(read.shape == t.shape and torch.equal(read, t) for t in beside):
                    raise ConfigError(
                        f"{blocks[later]} reads more of {blocks[b]} than the residual stream: "
                        "gradients cannot be taken block by block; give criterion.by_block=false"
                    )
