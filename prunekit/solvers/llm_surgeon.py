"""What rows, columns and elements of a matrix cost, and how the others make up for them, under a
curvature of two Kronecker factors (LLM Surgeon, van der Ouderaa et al., ICLR 2024, arXiv
2312.17244, section 3.2).

A change `D` of `W (outputs, inputs)` costs `tr(G D A D^T) / 2`. The columns S cost `tr(W_S^T G W_S
(A^-1_SS)^-1) / 2`, and then `W -= W_S (A^-1_SS)^-1 A^-1_S,:`. Rows are the columns of `W^T`, with A
and G in each other's place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit.solvers.least_squares import cholesky


def damped_inverse(factor: Tensor, ridge: float) -> Tensor:
    """Inverse of a factor `(n, n)` with `ridge` times its mean diagonal on it, in float64. Channels
    of which nothing is in it do not count in the mean, and stand alone.
    """
    H = factor.double()
    used = H.diagonal()[H.diagonal() > 0]
    alone = ridge * used.mean() if len(used) else H.new_ones(())
    return torch.cholesky_inverse(cholesky(H + torch.diag(alone.expand(len(H)))))


def column_costs(weight: Tensor, inverse: Tensor, outer: Tensor, units: Tensor) -> Tensor:
    """(U,) what each unit's columns of `weight (outputs, inputs)` cost by themselves, the others
    making up for them.

    `inverse` is `A^-1 (inputs, inputs)`, damped; `outer` is `G (outputs, outputs)`, as it is;
    `units (U, width)` are the columns of each.
    """
    W, units = weight.double(), units.to(inverse.device)
    M = W.T @ (outer.double() @ W)
    rows, columns = units[:, :, None], units[:, None, :]
    inner = torch.cholesky_inverse(cholesky(inverse[rows, columns]))  # (U, width, width)
    return (M[rows, columns] * inner).sum((1, 2)) / 2


def without_columns(weight: Tensor, inverse: Tensor, gone: Tensor) -> Tensor:
    """`weight (outputs, inputs)` in float64, the columns `gone` zero and the others making up for
    all of them together.
    """
    W, gone = weight.double(), gone.to(inverse.device)
    share = torch.cholesky_solve(inverse[gone], cholesky(inverse[gone][:, gone]))
    W = W - W[:, gone] @ share
    W[:, gone] = 0  # but for rounding
    return W


def element_costs(weight: Tensor, inverse: Tensor, outer_inverse: Tensor) -> Tensor:
    """(outputs, inputs) what each element of `weight` costs by itself, all others making up for it.

    `inverse` is `A^-1 (inputs, inputs)`, `outer_inverse` is `G^-1 (outputs, outputs)`.
    """
    return weight.double() ** 2 / torch.outer(outer_inverse.diagonal(), inverse.diagonal()) / 2


def without_elements(
    weight: Tensor, inverse: Tensor, outer_inverse: Tensor, gone: Tensor, together: int
) -> Tensor:
    """`weight (outputs, inputs)` in float64, the elements of `gone (outputs, inputs)` bool zero and
    the others making up for them: `together` of them at a time, the cheapest first, each lot from
    where the one before it left the matrix.

    What an earlier lot took moves again with a later one, and is zero at the end (the authors' code
    does so as well).
    """
    W = weight.double().clone()
    costs = element_costs(W, inverse, outer_inverse)[gone]
    rows, columns = (i[costs.argsort(stable=True)] for i in gone.nonzero(as_tuple=True))
    for r, c in zip(rows.split(together), columns.split(together), strict=True):
        K = outer_inverse[r][:, r] * inverse[c][:, c]
        Z = torch.zeros_like(W)
        Z[r, c] = torch.cholesky_solve(W[r, c][:, None], cholesky(K))[:, 0]
        W -= outer_inverse @ Z @ inverse
    return W.masked_fill_(gone, 0)
