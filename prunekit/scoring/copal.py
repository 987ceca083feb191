"""COPAL-like sensitivity of single weights (after Malla et al., ICML 2024, arXiv 2405.02347, which
came without code). Tensors in, tensors out.

This is a reading of the paper, not a check against its authors' numbers: a weight matters as much
as the energy of the layer's output answers to it, and what several texts say adds up.
"""

from __future__ import annotations

from torch import Tensor


def sensitivity(weight: Tensor, gram: Tensor) -> Tensor:
    """`|W * dE/dW|` for the energy `E = mean ||W x||^2`, whose gradient is `2 W E[x x^T]`.

    `weight (outputs, inputs)`, `gram (inputs, inputs)` the mean of `x x^T` over tokens. Where
    inputs do not correlate it is twice the square of Wanda's score. Those of several texts are
    added, always on the dense weights: a weight that is zero today would say nothing.
    """
    W = weight.float()
    return (W * (2 * W @ gram.to(W))).abs()
