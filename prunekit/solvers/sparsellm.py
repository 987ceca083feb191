"""SparseLLM, first called AdaGP (Bai et al., NeurIPS 2024, arXiv 2402.17946): the matrices of a
feed-forward block pruned for the sake of its output, by turns with what passes between them.
Tensors in, tensors out.

With X the input, Y the dense output, `z` (and `s` where there is a gate) before and `p` after the
activation `a`, all free to move, the objective is `alpha (|z - W_up X|^2 + |s - W_gate X|^2) +
gamma |p - a(s) z|^2 + beta |Y - W_down p|^2`; without a gate `a(z)` stands for `a(s) z` and the
term of `s` falls away. Tensors of tokens are `(T, channels)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prunekit.solvers.preconditioning import inverse

Activation = Callable[[Tensor], Tensor]
"""Of one element each, and differentiable by autograd."""


@dataclass(frozen=True)
class Ffn:
    """Weights `(outputs, inputs)` and biases of a feed-forward block; `gate` is None in a plain
    one.
    """

    act: Activation
    up: Tensor
    down: Tensor
    gate: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    gate_bias: Tensor | None = None

    def neurons(self, s: Tensor | None, z: Tensor) -> Tensor:
        """What the down matrix reads `(T, F)`."""
        return self.act(z) if s is None else self.act(s) * z

    def before(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """`s` and `z` that the weights give."""
        s = None if self.gate is None else linear(x, self.gate, self.gate_bias)
        return s, linear(x, self.up, self.up_bias)

    def __call__(self, x: Tensor) -> Tensor:
        return linear(self.neurons(*self.before(x)), self.down, self.down_bias)


@dataclass(frozen=True)
class Terms:
    """Weights of the objective's terms, and how `s` (`z` where there is no gate) descends."""

    alpha: float = 5.0
    beta: float = 5.0
    gamma: float = 5.0
    descents: int = 2
    rate: float = 0.01


@dataclass
class Auxiliaries:
    """`s` and `z`, free of the weights, and the block's fixed input and output."""

    x: Tensor
    y: Tensor
    s: Tensor | None
    z: Tensor

    @classmethod
    def of(cls, dense: Ffn, x: Tensor, chunk: int = 4096) -> Auxiliaries:
        """What the dense block gives for `x (T, C)`."""
        s, z = dense.before(x)
        y = torch.cat([dense(part) for part in torch.split(x, chunk)])
        return cls(x, y, s, z)


@dataclass
class Sums:
    """Over tokens: `p p^T (F, F)`, and what the refits are drawn to: `z x^T`, `s x^T`, `y p^T`."""

    pp: Tensor
    zx: Tensor
    yp: Tensor
    sx: Tensor | None


Reprune = Callable[[Ffn, Tensor], Ffn]
"""`reprune(refitted, pp)`: the block with its matrices pruned anew; `pp (F, F)` is the sum of `p
p^T`, the gram matrix of the down matrix's input.
"""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x, weight, bias)


def curvature(down: Tensor, terms: Terms, name: str) -> Tensor:
    """`(beta W^T W + gamma I)^-1` of the down matrix, `(F, F)`."""
    H = terms.beta * (down.T @ down).double()
    H.diagonal().add_(terms.gamma)
    return inverse(H, name).to(down)


def update_p(h: Tensor, y: Tensor, down: Tensor, inverse_of_p: Tensor, terms: Terms) -> Tensor:
    """The best `p` for neurons `h (T, F)` and outputs less bias `y (T, C)`:
    `(beta W^T W + gamma I)^-1 (beta W^T y + gamma h)`.
    """
    return (terms.beta * (y @ down) + terms.gamma * h) @ inverse_of_p


def update_z_gated(m: Tensor, p: Tensor, a: Tensor, terms: Terms) -> Tensor:
    """The best `z` behind a gate `a = a(s)`, for `m = W_up X`."""
    return (terms.alpha * m + terms.gamma * a * p) / (terms.alpha + terms.gamma * a.square())


def update_z_relu(m: Tensor, p: Tensor, terms: Terms) -> Tensor:
    """The best `z` before a ReLU: the cheaper of the best on either side of zero."""
    on = ((terms.gamma * p + terms.alpha * m) / (terms.gamma + terms.alpha)).clamp(min=0)
    off = m.clamp(max=0)
    cost_on = terms.alpha * (on - m).square() + terms.gamma * (p - on).square()
    cost_off = terms.alpha * (off - m).square() + terms.gamma * p.square()
    return torch.where(cost_on < cost_off, on, off)


def descend(
    x: Tensor, m: Tensor, p: Tensor, neurons: Callable[[Tensor], Tensor], terms: Terms
) -> Tensor:
    """`x` after gradient steps on `alpha |x - m|^2 + gamma |p - neurons(x)|^2`, element by element:
    one whose cost a step would raise (a large `z` makes it steep) stays where it is.
    """

    def cost(x: Tensor) -> Tensor:
        return terms.alpha * (x - m).square() + terms.gamma * (p - neurons(x)).square()

    for _ in range(terms.descents):
        with torch.enable_grad():
            free = x.detach().requires_grad_()
            before = cost(free)
            (slope,) = torch.autograd.grad(before.sum(), free)
        moved = x - terms.rate * slope
        x = torch.where(cost(moved) <= before.detach(), moved, x)
    return x


def is_relu(act: Activation, like: Tensor) -> bool:
    """Whether `act` is a ReLU on tensors `(T, F)` such as `like`."""
    x = torch.linspace(-4, 4, 65).to(like)[:, None].expand(65, like.shape[1])
    return torch.equal(act(x), x.clamp(min=0))


@torch.no_grad()
def update_auxiliaries(
    aux: Auxiliaries, ffn: Ffn, terms: Terms, name: str = "ffn", chunk: int = 4096
) -> Sums:
    """One turn of `p`, `z` and `s` for the weights of `ffn`, `z` and `s` in place, and the sums
    that the refit of the weights needs. `p` lives for one `chunk` of tokens only.
    """
    C, F = ffn.down.shape
    zeros = aux.x.new_zeros
    inputs = aux.x.shape[1]
    sx = None if aux.s is None else zeros(F, inputs)
    sums = Sums(pp=zeros(F, F), zx=zeros(F, inputs), yp=zeros(C, F), sx=sx)
    relu = aux.s is None and is_relu(ffn.act, aux.z)
    inner = curvature(ffn.down, terms, f"{name}, p")
    for start in range(0, len(aux.x), chunk):
        rows = slice(start, start + chunk)
        x, z, s = aux.x[rows], aux.z[rows], None if aux.s is None else aux.s[rows]
        y = aux.y[rows] if ffn.down_bias is None else aux.y[rows] - ffn.down_bias
        gate_m, up_m = ffn.before(x)
        p = update_p(ffn.neurons(s, z), y, ffn.down, inner, terms)
        if s is not None and gate_m is not None:
            z = update_z_gated(up_m, p, ffn.act(s), terms)
            s = descend(s, gate_m, p, lambda free, z=z: ffn.act(free) * z, terms)  # type: ignore[misc]
        elif relu:
            z = update_z_relu(up_m, p, terms)
        else:
            z = descend(z, up_m, p, ffn.act, terms)
        sums.pp += p.T @ p
        sums.yp += y.T @ p
        aux.z[rows] = z
        sums.zx += (z if ffn.up_bias is None else z - ffn.up_bias).T @ x
        if s is not None and aux.s is not None and sums.sx is not None:
            aux.s[rows] = s
            sums.sx += (s if ffn.gate_bias is None else s - ffn.gate_bias).T @ x
    return sums


def refit(weight: Tensor, gram: Tensor, cross: Tensor, ridge: float, name: str) -> Tensor:
    """The map nearest to `weight` that gives the targets: least squares of targets on inputs with
    `ridge` on its distance from `weight`, in units of the gram's mean diagonal.

    `gram (inputs, inputs)`, `cross (outputs, inputs)`: sums of `x x^T` and `target x^T`.
    """
    H, W = gram.double(), weight.double()
    gap = cross.double() - W @ H
    H = H.clone()
    H.diagonal().add_(ridge * H.diagonal().mean())
    return (W + gap @ inverse(H, name)).to(weight)


def output_error(ffn: Ffn, aux: Auxiliaries, chunk: int = 4096) -> float:
    """Mean squared error of the block's output."""
    parts = zip(torch.split(aux.x, chunk), torch.split(aux.y, chunk), strict=True)
    total = sum((ffn(x) - y).square().sum(dtype=torch.float64) for x, y in parts)
    return float(total) / aux.y.numel()


@torch.no_grad()
def alternate(
    dense: Ffn,
    pruned: Ffn,
    x: Tensor,
    reprune: Reprune,
    *,
    steps: int = 4,
    terms: Terms = Terms(),
    ridge: float = 1e-4,
    name: str = "ffn",
) -> tuple[Ffn, list[float]]:
    """The best block found in `steps` outer steps, and the error of its output after each.

    `pruned` is what the first step (plain SparseGPT) has made of `dense`; `x (T, C)` is the input.
    Every further step moves the auxiliaries, refits the weights to them and prunes these. The first
    of the blocks with the least error is kept, so the result is never worse than `pruned` on `x`.
    Raises ConfigError, with `name`, where a refit has no solution.
    """
    aux = Auxiliaries.of(dense, x)
    gram = x.T @ x
    errors = [output_error(pruned, aux)]
    best = last = pruned
    for _ in range(steps - 1):
        sums = update_auxiliaries(aux, last, terms, name)
        up = refit(dense.up, gram, sums.zx, ridge, f"{name}, up")
        down = refit(dense.down, sums.pp, sums.yp, ridge, f"{name}, down")
        gate = dense.gate
        if gate is not None and sums.sx is not None:
            gate = refit(gate, gram, sums.sx, ridge, f"{name}, gate")
        last = reprune(replace(dense, up=up, down=down, gate=gate), sums.pp)
        errors.append(output_error(last, aux))
        if errors[-1] < min(errors[:-1]):
            best = last
    return best, errors
