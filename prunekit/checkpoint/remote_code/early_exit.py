"""Early exit: a token leaves the stack of blocks as soon as a classifier says that the prediction
is made. Written by prunekit beside the weights; imports nothing of prunekit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .runtime_base import RuntimeModule, owner

CHUNK = 1024
"""Tokens whose logits are made at once."""


class Filled(Exception):
    """The block has filled the cache; the rest of it need not run."""


class Progress:
    """Where a forward is, and what all forwards came to.

    Attributes:
        never: no token leaves.
        depth: blocks passed.
        exited: (N, T) tokens that left.
    """

    def __init__(self) -> None:
        self.never = False
        self.depth = 0
        self.exited = torch.zeros(0, dtype=torch.bool)
        self.plain = False
        self.clear()

    def clear(self) -> None:
        """Begin to count anew."""
        self.passes: Tensor | int = 0
        self.tested: Tensor | int = 0
        self.tokens = 0


class EarlyExit(RuntimeModule):
    """A linear classifier of what the model would predict after each of its blocks. A token that
    it lets go keeps its hidden state through all later blocks, whose keys and values are made from
    it.

    Features are the gap between the two highest probabilities, and the highest one, after the final
    norm and the output matrix. Once all tokens of a forward have left, a block is skipped; where
    there is a cache it runs as far as its attention, which fills the cache.

    blocks: the list of blocks. norm: the final norm ("" for none). head: the output matrix.
    reader: in a block, what reads the attention's heads ("" where there is none: blocks run whole).
    start: blocks that every token passes. every: blocks from one classification to the next.
    """

    def __init__(self, blocks: str, norm: str, head: str, reader: str, start: int, every: int):
        super().__init__()
        if not all(type(s) is str for s in (blocks, norm, head, reader)):
            raise ValueError("blocks, norm, head and reader are names of modules")
        if not blocks or not head:
            raise ValueError("blocks and head cannot be empty")
        if not all(type(n) is int and 1 <= n <= 1 << 16 for n in (start, every)):
            raise ValueError(f"start={start!r} or every={every!r} is no number of blocks")
        self.names = {"blocks": blocks, "norm": norm, "head": head, "reader": reader}
        self.start, self.every = start, every
        self.weight = nn.Parameter(torch.zeros(1, 2), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.progress = Progress()
        self.read: list[nn.Module] = []
        self.blocks: list[nn.Module] = []

    def numbers(self) -> dict[str, Any]:
        return {**self.names, "start": self.start, "every": self.every}

    def attach(self, model: nn.Module, path: str) -> None:
        # Lists are no modules: what is in them stays where it is.
        names = [self.names["norm"], self.names["head"]]
        self.read = [owner(model, f"{name}.weight")[0] for name in names if name]
        self.blocks = list(owner(model, f"{self.names['blocks']}.weight")[0].children())
        for block in self.blocks if self.names["reader"] else ():
            owner(block, f"{self.names['reader']}.weight")
        for block in self.blocks:
            # accelerate has put its own there, which moves tensors between devices
            whole = vars(block).get("forward") or partial(type(block).forward, block)
            block.forward = partial(self.step, block, whole)

    @property
    def tests(self) -> list[int]:
        """After how many blocks tokens are classified."""
        return list(range(self.start, len(self.blocks), self.every))

    def predictions(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What hidden states `x (n, C)` would predict: features (n, 2) float32, token ids (n,)."""
        features, ids = [], []
        for part in x.split(CHUNK):
            for module in self.read:
                part = module(part)
            top, index = part.float().softmax(-1).topk(2)
            features.append(torch.stack([top[:, 0] - top[:, 1], top[:, 0]], 1))
            ids.append(index[:, 0])
        return torch.cat(features), torch.cat(ids)

    def forward(self, features: Tensor) -> Tensor:
        """How sure the classifier is of features (..., 2); it lets go above 0."""
        return (features @ self.weight.float().T + self.bias.float())[..., 0]

    def step(self, block: nn.Module, whole: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a block's forward does; `whole` is its own."""
        x: Tensor = args[0] if args else kwargs["hidden_states"]
        now = self.progress
        if block is self.blocks[0]:
            now.depth, now.exited = 0, torch.zeros(x.shape[:-1], dtype=torch.bool, device=x.device)
            now.tokens += now.exited.numel()
        now.depth += 1
        if now.plain and now.depth > self.start and bool(now.exited.all()):
            self.fill(block, whole, args, kwargs)
            return x
        now.passes = now.passes + (~now.exited).sum().cpu()
        out = whole(*args, **kwargs)
        now.plain = isinstance(out, Tensor)
        y = out if now.plain else out[0]
        now.exited = now.exited.to(y.device)
        y = torch.where(now.exited[..., None], x.to(y.device), y)
        if not now.never and now.depth in self.tests:
            left = ~now.exited
            if bool(left.any()):
                now.tested = now.tested + left.sum().cpu()
                now.exited = now.exited.clone()
                features = self.predictions(y[left])[0].to(self.weight.device)
                now.exited[left] = (self(features) > 0).to(y.device)
        return y if now.plain else (y, *out[1:])

    def fill(
        self, block: nn.Module, whole: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> None:
        """Write a block's keys and values into the cache, where there is one."""
        if not any(hasattr(v, "get_seq_length") for v in (*args, *kwargs.values())):
            return
        hooks = []
        if self.names["reader"]:
            reader = block.get_submodule(self.names["reader"])
            hooks.append(reader.register_forward_pre_hook(self.filled))
        try:
            whole(*args, **kwargs)
        except Filled:
            pass
        finally:
            for hook in hooks:
                hook.remove()

    def filled(self, module: nn.Module, args: Any) -> None:
        raise Filled
