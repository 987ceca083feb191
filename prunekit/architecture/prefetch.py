"""Copying the part of a streamed model that runs next to a GPU while another part runs there.

What runs next is what ran next the last time. Before it begins, the host waits until the part
before this one has run: so no more than two parts are on the GPU, and no copy takes memory that is
still read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

Resting = Callable[[nn.Module], list[Tensor]]
"""The parameters of a part that are not on the device."""


class Ahead:
    """Copies to a CUDA device on a stream of its own."""

    def __init__(self, device: torch.device):
        self.device = device
        self.side = torch.cuda.Stream(device)
        self.after: WeakKeyDictionary[nn.Module, ref[nn.Module]] = WeakKeyDictionary()
        self.last: ref[nn.Module] | None = None
        self.coming: ref[nn.Module] | None = None
        self.copies: dict[Tensor, tuple[int, int, Tensor]] = {}

    def begin(self, module: nn.Module, resting: Resting) -> None:
        """`module`, which is there, is about to run: begin to copy what runs after it."""
        last = None if self.last is None else self.last()
        if last is not None:
            self.after[last] = ref(module)
        self.last = ref(module)
        known = self.after.get(module)
        following = None if known is None else known()
        if following is None:
            return
        torch.cuda.current_stream(self.device).synchronize()
        with torch.cuda.stream(self.side):
            for p in resting(following):
                copied = p.data.to(self.device, non_blocking=True, copy=True)
                self.copies[p] = (p._version, p.data_ptr(), copied)
        self.coming = ref(following)

    def take(self, module: nn.Module, wanted: Sequence[Tensor]) -> list[Tensor | None]:
        """Copies of what is `wanted` of a module, None where there is none of what it is now."""
        expected = self.coming is not None and self.coming() is module
        copies = self.copies if expected else {}
        if copies:
            self.side.synchronize()
        self.drop()
        found: list[Tensor | None] = []
        for p in wanted:
            version, address, copied = copies.get(p, (None, None, None))
            same = version == p._version and address == p.data_ptr()
            found.append(copied if same else None)
        return found

    def drop(self) -> None:
        """Give up what was copied ahead."""
        self.copies, self.coming = {}, None
