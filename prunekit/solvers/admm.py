"""ADMM pruning (Boža, TMLR 2024, arXiv 2401.02938): the least squares over the weights that stay,
by the alternating direction method of multipliers, and a mask that is chosen on the way. Tensors
in, tensors out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prunekit.selection.elements import floor_share, of_each_run, per_matrix
from prunekit.solvers.preconditioning import inverse, unit_diagonal

Select = Callable[[Tensor, int], Tensor]
"""`select(scores, count)`: the mask `(outputs, inputs)` of what stays when `count` elements of the
matrix go, by scores that are not negative. `per_row` and `per_matrix` of `selection.elements` are
two.
"""


def lowest_outside_runs(kept: int, m: int) -> Select:
    """The `kept` highest of each run of `m` inputs stay whatever `count` is; the others go
    lowest first, all of them once `count` is their number.
    """

    def select(scores: Tensor, count: int) -> Tensor:
        safe = of_each_run(scores, kept, m)
        return per_matrix(scores.masked_fill(safe, torch.inf), count)

    return select


def fixed(mask: Tensor) -> Select:
    """A mask `(outputs, inputs)` that is given."""
    return lambda scores, count: mask


def cubic(count: int, step: int, steps: int) -> int:
    """How many of `count` elements are gone at step 1 to `steps`: `count (1 - (1 - step /
    steps)^3)`, rounded down.
    """
    return floor_share(count, 1 - (1 - step / steps) ** 3)


@torch.no_grad()
def admm(
    weight: Tensor,
    gram: Tensor,
    select: Select,
    count: int,
    *,
    iterations: int = 20,
    reselect: int = 15,
    ridge: float = 0.1,
    penalty: float = 1.0,
    name: str = "weight",
) -> tuple[Tensor, Tensor]:
    """New weights and the mask of what stays, both `(outputs, inputs)`, float32.

    With inputs scaled to unit norm (so that `|V|` is Wanda's score) and `A` their gram matrix plus
    `ridge` on the diagonal, each iteration takes `Z = M (V + U)`, `U += V - Z`, `V = (A V0 +
    penalty (Z - U)) (A + penalty I)^-1`. The ridge holds weights to their dense values, not to
    zero. The first `reselect <= iterations` choose `M` anew from `|V + U|`, for a count that
    grows as `cubic` says; 0 keeps the mask of the dense weights (the paper's ADMM1).

    `gram (inputs, inputs)`: the sum or mean of `x x^T`. `count` elements go. Raises ConfigError,
    with `name`, where `A` has no inverse.
    """
    A, norms = unit_diagonal(gram)
    A.diagonal().add_(ridge * A.diagonal().mean())
    step = A.clone()
    step.diagonal().add_(penalty)
    step, A, norms = inverse(step, name).float(), A.float(), norms.float()
    V = weight.float() * norms
    fit = V @ A
    U = torch.zeros_like(V)
    mask = select(V.abs(), count)
    for t in range(1, iterations + 1):
        if t <= reselect:
            mask = select((V + U).abs(), cubic(count, t, reselect))
        Z = (V + U) * mask
        U += V - Z
        V = (fit + penalty * (Z - U)) @ step
    return (V + U) * mask / norms, mask
