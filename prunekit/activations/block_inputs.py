"""What enters the blocks: the inputs of the first one, and the arguments that all get beside the
hidden state, so that each can be run alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from prunekit.activations import processes
from prunekit.activations.hooks import first_tensor, raise_stop, stop_early
from prunekit.activations.runs import samples_at_once
from prunekit.activations.storage import Activations, PassOptions, Precision, autocast, resolved
from prunekit.architecture.offload import input_device
from prunekit.architecture.streaming import device_of
from prunekit.errors import ConfigError

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional arguments after the hidden state, and keyword arguments, of one call of a block."""
PLAIN = (int, float, str, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class BlockInputs:
    """The arguments that each block gets besides the hidden state, by batch:
    `calls[block][batch]`.
    """

    blocks: tuple[str, ...]
    rows: tuple[slice, ...]
    calls: tuple[tuple[Call, ...], ...]
    precision: Precision = "model"

    def forward(self, module: nn.Module, block: int, batch: int, x: Tensor) -> Tensor:
        """Output of `module`, standing where block number `block` stands, for the hidden state `x
        (n, T, C)`.
        """
        args, kwargs = self.calls[block][batch]
        with autocast(self.precision, x.device):
            return first_tensor(module(x, *args, **kwargs))


@torch.no_grad()
def capture_inputs(
    model: nn.Module, blocks: tuple[str, ...], tokens: Tensor, options: PassOptions
) -> tuple[Activations, BlockInputs]:
    """The first block's inputs for `tokens (N, T)`, and all arguments of every block.

    One sample goes through the whole model, the batches up to the last block that gets an object
    which none before it got: for most models the first one. Where the arguments of two batches
    agree, those of the others are taken to be the same. Raises ConfigError where a block does not
    read the output of the block before it, since then it cannot be replayed alone.
    """
    processes.check_samples(tokens)
    batch = options.batch or samples_at_once(tokens)
    batch = min(batch, len(tokens) // processes.count())
    rows = tuple(slice(i, min(i + batch, len(tokens))) for i in range(0, len(tokens), batch))
    device = input_device(model) or device_of(model)
    inputs: Activations | None = None
    calls: list[list[Call]] = []  # [batch][block]
    with autocast(options.precision, device):
        _, sample = _trace(model, blocks, tokens[:1].to(device), None)
    newest = _last_new(sample)
    for i, part in enumerate(
        tqdm(rows, desc="inputs of the first block", unit="batch", leave=False, delay=2)
    ):
        full = part.stop - part.start == batch
        known = full and i >= 2 and _agree(calls[0], calls[1])
        with autocast(options.precision, device):
            ids = tokens[part].to(device)
            x, seen = _trace(model, blocks, ids, 0 if known else newest)
            if not known and _plain(seen) != _plain(sample[: len(seen)]):
                x, seen = _trace(model, blocks, ids, None)
        if inputs is None:
            inputs = Activations(len(tokens), x, options.store)
        inputs[part] = x
        calls.append(calls[0] if known else _shared(_as_in(sample, seen), calls))
    assert inputs is not None  # tokens are never empty: the runner checks calibration data
    return inputs, BlockInputs(
        blocks,
        rows,
        tuple(tuple(c[b] for c in calls) for b in range(len(blocks))),
        resolved(options.precision, device),
    )


def _trace(
    model: nn.Module, blocks: tuple[str, ...], ids: Tensor, until: int | None
) -> tuple[Tensor, list[Call]]:
    """The first block's input, and the calls of the blocks up to number `until`; None: of all."""
    seen: list[tuple[Tensor, Call]] = []
    last: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = first_tensor(args, kwargs)
        rest = {k: v for k, v in kwargs.items() if args or k != "hidden_states"}
        if len(seen) == len(blocks) or module is not modules[len(seen)]:
            raise ConfigError(
                f"a forward does not run {blocks[0]} to {blocks[-1]} once each, in their order: "
                "they cannot be run block by block"
            )
        if x.dim() != 3 or x.shape[:2] != ids.shape:
            raise ConfigError(
                f"{blocks[len(seen)]} reads {tuple(x.shape)} for {len(ids)} x "
                f"{ids.shape[1]} tokens, not one state a token: it cannot be run block by block"
            )
        if last and not torch.equal(last[0], x):
            if not x.isfinite().all():
                raise ConfigError(
                    f"what {blocks[len(seen) - 1]} puts out on this text is not finite: try "
                    "model.dtype=float32, pruner.precision=model or other calibration text"
                )
            raise ConfigError(
                f"{blocks[len(seen)]} does not read what {blocks[len(seen) - 1]} puts out: it "
                "cannot be run block by block"
            )
        seen.append((x, (args[1:], rest)))
        if len(seen) - 1 == until:
            raise_stop()

    def after(module: nn.Module, args: Any, out: Any) -> None:
        last[:] = [first_tensor(out)]

    modules = [model.get_submodule(b) for b in blocks]
    hooks = [m.register_forward_pre_hook(before, with_kwargs=True) for m in modules] + [
        m.register_forward_hook(after) for m in modules
    ]
    try:
        with stop_early():
            body = getattr(model, "base_model", model)
            body(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if until is None and len(seen) != len(blocks):
        raise ConfigError(
            f"{len(blocks)} blocks were found, but a forward runs {len(seen)} of them: they "
            "cannot be run block by block"
        )
    return seen[0][0], [call for _, call in seen]


def _leaves(a: Any) -> Iterator[Any]:
    """What stands in a call, plain containers opened."""
    if type(a) in (tuple, list, dict):
        for x in a.values() if isinstance(a, dict) else a:
            yield from _leaves(x)
    elif not isinstance(a, PLAIN):
        yield a


def _last_new(calls: list[Call]) -> int:
    """Number of the last block that gets an object, no number or word, which none before it got."""
    seen: set[int] = set()
    last = 0
    for block, call in enumerate(calls):
        new = {id(x) for x in _leaves(call)}
        last = last if new <= seen else block
        seen |= new
    return last


def _plain(a: Any) -> Any:
    """What stands in calls, objects replaced by their types: numbers and words that depend on how
    many samples there are cannot be taken from one sample.
    """
    if type(a) is dict:
        return {k: _plain(x) for k, x in a.items()}
    if type(a) in (tuple, list):
        return [_plain(x) for x in a]
    return a if isinstance(a, PLAIN) else type(a)


def _as_in(sample: list[Call], seen: list[Call]) -> list[Call]:
    """All calls of a batch of which some were seen: the other blocks get what these got, as they do
    for the one `sample`.
    """
    there = {
        id(x): y
        for call, other in zip(sample, seen)
        for x, y in zip(_leaves(call), _leaves(other), strict=True)
    }

    def put(a: Any) -> Any:
        if type(a) is dict:
            return {k: put(x) for k, x in a.items()}
        if type(a) in (tuple, list):
            return type(a)(map(put, a))
        return there.get(id(a), a)

    return [*seen, *(put(call) for call in sample[len(seen) :])]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b)))
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return a is b or (isinstance(a, (int, float, str, bool)) and a == b)


def _agree(a: list[Call], b: list[Call]) -> bool:
    return all(_same(x, y) for x, y in zip(a, b, strict=True))


def _shared(calls: list[Call], earlier: list[list[Call]]) -> list[Call]:
    """The calls, each replaced by an equal one that is kept already: masks and rotary tables are
    the same for most blocks.
    """
    pool: list[Call] = [c for cs in earlier[:1] for c in cs[:2]]
    out = []
    for call in calls:
        found = next((p for p in pool if _same(p, call)), None)
        if found is None:
            pool.append(call)
        out.append(found or call)
    return out
