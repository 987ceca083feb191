"""RIA's score of single weights (Zhang et al., ICLR 2024, "Plug-and-Play"): a weight matters as
much as it makes up of what its input sends and of what its output gets. Tensors in, tensors out.
"""

from __future__ import annotations

import torch
from torch import Tensor


def relative_importance(weight: Tensor) -> Tensor:
    """`|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|` for `weight (outputs, inputs)`.

    The sum over a matrix without empty rows and columns is outputs + inputs. Where a whole row or
    column is zero, its share is zero.
    """
    size = weight.float().abs()
    tiny = torch.finfo(size.dtype).tiny
    by_input = size / size.sum(0, keepdim=True).clamp(min=tiny)
    by_output = size / size.sum(1, keepdim=True).clamp(min=tiny)
    return by_input + by_output


def ria_score(weight: Tensor, norms: Tensor, a: float = 0.5) -> Tensor:
    """Relative importance times `||X_j||_2^a` for `weight (outputs, inputs)`, `norms (inputs)`."""
    return relative_importance(weight) * norms.to(weight.device).float() ** a
