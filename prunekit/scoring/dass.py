"""DaSS's scores of the matrices of a gated FFN (Guo et al., TMLR 2025, arXiv 2405.01943): what
makes an intermediate channel matters as much as that channel is large. Tensors in, tensors out.
"""

from __future__ import annotations

from torch import Tensor


def maker_score(weight: Tensor, norms: Tensor, alpha: float = 0.5) -> Tensor:
    """`|W_ij| * ||z_i||_2^alpha` for `weight (channels, inputs)` of gate or up, and `norms
    (channels)` of the intermediate activations z.

    To be compared along the input column: all channels compete for what one input brings, so that
    weak channels lose more. The reader of the channels (down) is scored as Wanda does.
    """
    return weight.float().abs() * (norms.to(weight.device).float() ** alpha)[:, None]
