"""A matrix without its small singular components (LASER: Sharma et al., ICLR 2024, arXiv
2312.13558), as two thin factors. Tensors in, tensors out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """`left (outputs, rank)` and `right (rank, inputs)`; their product stands for the matrix."""

    left: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        """(outputs, inputs)."""
        return self.left @ self.right


class Spectrum(NamedTuple):
    """The singular value decomposition of a matrix: `U (outputs, k)`, `values (k)` from large to
    small, `V (k, inputs)`, with k = min(outputs, inputs).
    """

    U: Tensor
    values: Tensor
    V: Tensor

    def truncated(self, rank: int) -> Factors:
        """The nearest matrix of that rank, in the Frobenius norm and in the spectral one; both
        factors carry the square roots of the values, so that neither is much larger.
        """
        root = self.values[:rank].sqrt()
        return Factors(self.U[:, :rank] * root, root[:, None] * self.V[:rank])

    def error(self, rank: int) -> Tensor:
        """Frobenius norm of what the matrix of that rank leaves out."""
        return self.values[rank:].square().sum().sqrt()


def spectrum(weight: Tensor) -> Spectrum:
    """The exact decomposition of `weight (outputs, inputs)`, in float32, or float64 if it is."""
    precise = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return Spectrum(*torch.linalg.svd(precise, full_matrices=False))


def rank_of(shape: tuple[int, ...], share: float) -> int:
    """`floor(share * min(outputs, inputs))`, at least one."""
    # 1e-9 keeps an exact product such as 100 * 0.29 from falling below its integer.
    return max(1, int(share * min(shape) + 1e-9))


def smaller_as_factors(shape: tuple[int, ...], rank: int) -> bool:
    """Whether two factors hold fewer numbers than the dense matrix."""
    outputs, inputs = shape
    return rank * (outputs + inputs) < outputs * inputs
