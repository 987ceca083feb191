"""How many parameters a choice of units leaves, from shapes alone: no weights are touched, so it
works on the meta device.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

from torch import nn

from prunekit.types import Counts, Group


class Sizes:
    """Exact parameter counts of a model after removing given numbers of units from given groups."""

    def __init__(self, model: nn.Module, groups: Iterable[Group]):
        self.groups = {g.name: g for g in groups}
        # Tied tensors appear once.
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.total = sum(math.prod(s) for s in self.shapes.values())
        self._modules = {
            name: sum(p.numel() for p in model.get_submodule(name).parameters())
            for g in self.groups.values()
            for name in g.modules
        }

    def removed(self, counts: Counts) -> int:
        """Parameters that go when `counts[name]` units of each group go. Blocks are counted at
        their mean size.
        """
        cut: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
        gone = 0.0
        for name, n in counts.items():
            group = self.groups[name]
            for m in group.members:
                if m.param in self.shapes:  # buffers are not parameters
                    cut[m.param][m.axis] += n * m.width
            if group.kind == "weights":
                gone += n
            if group.modules:
                gone += n * sum(self._modules[x] for x in group.modules) / len(group.modules)
        for param, axes in cut.items():
            shape = self.shapes[param]
            gone += math.prod(shape) - math.prod(s - axes.get(a, 0) for a, s in enumerate(shape))
        return round(gone)

    def prunable(self) -> int:
        """Parameters that belong to at least one unit of the groups."""
        return self.removed({name: g.units for name, g in self.groups.items()})
