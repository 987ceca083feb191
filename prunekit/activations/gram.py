"""Gram statistics of linear modules, streamed: `H = sum_t w_t x_t x_t^T`, `C = sum_t w_t x_t
y_t^T`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from prunekit.activations import processes
from prunekit.activations.hooks import hook_activations, pass_tokens
from prunekit.activations.sharing import places_of, reaching, watched
from prunekit.architecture.matrices import module_name
from prunekit.errors import ConfigError
from prunekit.types import Group, Run

log = logging.getLogger("prunekit")


class GramStatistics:
    """Sums over tokens of a module's inputs `x (inputs)` and of the outputs `y (outputs)` it should
    give, float32 on the inputs' device.

    Tokens may have weights; `total` is their sum, `tokens` the number of tokens. With `bf16` (for
    activations that come in that precision) factors are rounded to bfloat16, several times faster
    where the hardware has it; sums remain float32.
    """

    def __init__(
        self, inputs: int, outputs: int = 0, device: torch.device | str = "cpu", bf16: bool = False
    ):
        self.bf16 = bf16
        self.gram = torch.zeros(inputs, inputs, device=device)
        self.cross = torch.zeros(inputs, outputs, device=device)
        self.sum_x = torch.zeros(inputs, device=device)
        self.sum_y = torch.zeros(outputs, device=device)
        self.total = torch.zeros((), dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, x: Tensor, y: Tensor | None = None, w: Tensor | None = None) -> None:
        """Take in `x (..., inputs)`, `y (..., outputs)` and weights `w (...)`."""
        x = x.reshape(-1, x.shape[-1]).float()
        w = torch.ones(len(x), device=x.device) if w is None else w.reshape(-1).float()
        root = w.sqrt()[:, None]
        # The same rounding in all sums: a centred gram stays positive.
        xw = (x * root).bfloat16().float() if self.bf16 else x * root
        with rounding(self.bf16):
            self.gram += xw.T @ xw
        self.sum_x += xw.T @ root[:, 0]
        if y is not None:
            yw = y.reshape(-1, y.shape[-1]).float() * root
            with rounding(self.bf16):
                self.cross += xw.T @ yw
            self.sum_y += yw.T @ root[:, 0]
        self.total += w.double().sum()
        self.tokens += len(x)

    def add_up(self) -> None:
        """Take in what the other processes saw."""
        tokens = torch.tensor(self.tokens, dtype=torch.float64, device=self.total.device)
        processes.add_up([self.gram, self.cross, self.sum_x, self.sum_y, self.total, tokens])
        self.tokens = int(tokens)


def added(parts: Sequence[GramStatistics]) -> GramStatistics:
    """The sums over the tokens of all `parts`; of a single one itself."""
    if len(parts) == 1:
        return parts[0]
    outputs = parts[0].cross.shape[1]
    whole = GramStatistics(len(parts[0].gram), outputs, parts[0].gram.device, parts[0].bf16)
    for part in parts:
        whole.gram += part.gram
        whole.cross += part.cross
        whole.sum_x += part.sum_x
        whole.sum_y += part.sum_y
        whole.total += part.total
        whole.tokens += part.tokens
    return whole


def warn_of_little_text(tokens: Tensor, inputs: Mapping[str, int]) -> None:
    """Say so, by name, where `tokens (N, T)` are fewer than the inputs of a module: its gram matrix
    is singular but for the ridge.
    """
    short = [name for name, n in inputs.items() if n > tokens.numel()]
    if short:
        widest = max(short, key=lambda name: inputs[name])
        log.warning(
            "%d calibration tokens say little about the %d inputs of %s, the widest of %d such "
            "modules: the weights that remain will fit noise; take more text, e.g. "
            "calib=general",
            tokens.numel(),
            inputs[widest],
            widest,
            len(short),
        )


@contextmanager
def rounding(bf16: bool) -> Iterator[None]:
    """float32 matrix products may round their factors (not the sums) to bfloat16 inside.

    On NVIDIA's cards that means TF32, which keeps all of a bfloat16 number: nothing is lost there.
    Elsewhere products are as torch has them, without TF32 unless a user asks for it.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if bf16 else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class SharedGrams:
    """Gram matrices of several modules' inputs; modules that are shown the same tensor (q, k and v)
    share one.
    """

    def __init__(self) -> None:
        self.sums: dict[str, GramStatistics] = {}
        self.owner: dict[str, str] = {}
        self.last: tuple[str, Tensor] | None = None

    def see(self, name: str, x: Tensor) -> None:
        """Take in `x (..., inputs)` of module `name`. The last tensor is held, so that its memory
        cannot become another one's. No tokens are nothing to take in: all such tensors look alike.
        """
        if not x.numel():
            return
        if name not in self.owner:
            same = (
                self.last is not None
                and self.last[1].data_ptr() == x.data_ptr()
                and self.last[1].shape == x.shape
            )
            self.owner[name] = self.last[0] if same and self.last else name
        if self.owner[name] == name:
            self.sums.setdefault(name, GramStatistics(x.shape[-1], 0, x.device)).add(x)
            self.last = (name, x)


def _add_up(shared: SharedGrams, names: list[str]) -> None:
    """The sums of all processes. Raises ConfigError where some processes have none of a module's,
    and others have.
    """
    if processes.count() == 1:
        return
    lacking = torch.tensor([float(name not in shared.owner) for name in names])
    processes.add_up([lacking])
    for name, some in zip(names, lacking.tolist(), strict=True):
        if 0 < some < processes.count():
            raise ConfigError(
                f"no calibration token of one of the processes reaches {name} (an idle expert?): "
                "calibrate on more text, or in one process"
            )
    for name in dict.fromkeys(shared.owner[name] for name in names if name in shared.owner):
        shared.sums[name].add_up()


def grams(model: nn.Module, groups: list[Group], run: Run) -> list[tuple[list[Group], Tensor]]:
    """Groups that read the same input, and the mean of `x x^T` over the tokens of that input, of
    all modules that use a group's matrix; one pass of the block, or of the model where such a
    module stands in another one.

    Raises ConfigError for a matrix that no token reaches: it has no input to go by.
    """
    shared = SharedGrams()
    places = places_of(model, [module_name(g) for g in groups])
    users = {name: watched(model, row) for name, row in places.items()}
    names = [name for row in users.values() for name in row]
    with hook_activations(model, inputs={name: partial(shared.see, name) for name in names}):
        pass_tokens(processes.own_part(reaching(run, places)), "inputs")
    _add_up(shared, names)
    mates: dict[tuple[str, ...], list[Group]] = {}
    for g in groups:
        seen = (shared.owner[n] for n in users[module_name(g)] if n in shared.owner)
        owners = tuple(dict.fromkeys(seen))
        if not owners:
            raise ConfigError(
                f"no calibration token reaches {module_name(g)} (an idle expert?): calibrate on "
                "more text, or narrow pruner.targets"
            )
        mates.setdefault(owners, []).append(g)
    sums = [(row, added([shared.sums[name] for name in owners])) for owners, row in mates.items()]
    return [(row, s.gram / s.tokens) for row, s in sums]
