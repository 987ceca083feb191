"""Multiply-accumulates of one forward pass, by LLM-Pruner's rules (arXiv 2305.11627, Table 3: 64
token ids, batch 1).
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.architecture.linear import is_linear, weight_of
from prunekit.architecture.modes import eval_mode
from prunekit.errors import ConfigError

# What the libraries call these two numbers, on the attention module or in the config.
_HEAD_DIM = (
    "v_head_dim",
    "head_dim",
    "head_size",
    "attention_head_size",
    "hidden_size_per_attention_head",
)
_TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_top_k",
    "top_k_experts",
    "moe_topk",
    "moe_k",
    "top_k",
)


def macs(model: nn.Module, tokens: int = 64) -> int:
    """Multiply-accumulates from the shapes of the parameters alone: nothing runs, so the meta
    device is fine.

    With q tokens: a matrix outside of the embeddings q * elements (experts: the share that a token
    visits); a norm 2 * q * width; an MLP q * F for its activation; an attention 2 * q * (H + G) * D
    for the rotary embedding and (2 * q * q * D + q * q) * H for scores, softmax and weighted sum.
    Widths are each layer's own. The paper writes projections as 4 * q * C * H * D and rotary as 4 *
    q * H * D: the same for G = H, and too much for grouped queries. State-space scans and linear
    attention have no term of their own. Raises ConfigError where an attention's head size is
    nowhere.
    """
    total = 0
    rotary = any("rotary" in type(m).__name__.lower() for m in model.modules())
    for name, module in model.named_modules():
        if _is_attention(module):
            once = _attention(name, module, model, tokens, rotary)
        else:
            once = tokens * (_norm_width(module) + _ffn_width(module))
        visited = _visited(model, name, module)
        total += round(visited * (once + tokens * _matrix_elements(module)))
    return total


def flop_counter_macs(model: nn.Module, tokens: int = 64) -> float:
    """Half the FLOPs that `torch.utils.flop_counter` sees in one forward pass over `tokens` ids,
    batch 1.
    """
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def cpu_attention(
        query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any
    ) -> int:
        return int(sdpa_flop_count(query, key, value))

    def grouped_mm(rows: Any, experts: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return int(2 * math.prod(rows) * experts[-1])  # (R, K) rows sorted by expert x (E, K, N)

    # Neither the CPU's fused attention nor the product of fused experts has a formula in torch's
    # own table (2.13).
    extra: dict[Any, Any] = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: cpu_attention
    }
    if hasattr(torch.ops.aten, "_grouped_mm"):
        extra[torch.ops.aten._grouped_mm] = grouped_mm
    counter = FlopCounterMode(display=False, custom_mapping=extra)
    device = next(model.parameters()).device
    with eval_mode(model), torch.no_grad(), counter:
        model(input_ids=torch.ones(1, tokens, dtype=torch.long, device=device), use_cache=False)
    return counter.get_total_flops() / 2


def _is_attention(module: nn.Module) -> bool:
    kind = type(module).__name__.lower()
    return ("attention" in kind or "attn" in kind) and len(_linears(module)) >= 2


def _linears(module: nn.Module) -> list[tuple[int, int]]:
    """(in, out) features of the linear maps among the direct children; a factorised one (a
    Sequential of linears) is one map.
    """
    shapes = []
    for child in module.children():
        parts = list(child.children()) if isinstance(child, nn.Sequential) else [child]
        if parts and all(is_linear(p) for p in parts):
            shapes.append((weight_of(parts[0]).shape[1], weight_of(parts[-1]).shape[0]))
    return shapes


def _matrix_elements(module: nn.Module) -> int:
    if isinstance(module, nn.Embedding):
        return 0
    return sum(p.numel() for p in module.parameters(recurse=False) if p.ndim >= 2)


def _norm_width(module: nn.Module) -> int:
    weight = getattr(module, "weight", None)
    if (
        "norm" not in type(module).__name__.lower()
        or not isinstance(weight, Tensor)
        or weight.ndim != 1
    ):
        return 0
    return 2 * weight.numel()


def _ffn_width(module: nn.Module) -> int:
    """Activations of an MLP: what enters its last linear map (or its last fused (E, C, F) expert
    tensor).
    """
    fused = _fused_experts(module)
    if len(fused) >= 2:
        first, last = fused[0].shape, fused[-1].shape
        return last[0] * (last[2] if last[1] in first[1:] else last[1])
    shapes = [] if isinstance(module, nn.Sequential) else _linears(module)
    return shapes[-1][0] if len(shapes) >= 2 else 0


def _fused_experts(module: nn.Module) -> list[Tensor]:
    if "expert" not in type(module).__name__.lower():
        return []
    return [p for p in module.parameters(recurse=False) if p.ndim == 3]


def _visited(model: nn.Module, name: str, module: nn.Module) -> float:
    """Share of this module that one token meets: top_k / E for what lies inside of E routed
    experts, else 1.
    """
    fused, path = _fused_experts(module), name.split(".")
    experts = len(fused[0]) if fused else 0
    for i, (a, b) in enumerate(pairwise(path)):
        if not experts and a == "experts" and b.isdigit():
            experts = len(list(model.get_submodule(".".join(path[: i + 1])).children()))
    return min(_number(_TOP_K, module, model, experts), experts) / experts if experts else 1


def _number(names: tuple[str, ...], module: nn.Module, model: nn.Module, otherwise: int = 0) -> int:
    """First of the names that is an int on the module, else in the model's (text) config."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = (getattr(holder, n, None) for holder in (module, config) for n in names)
    return next((v for v in found if isinstance(v, int)), otherwise)


def _attention(name: str, module: nn.Module, model: nn.Module, tokens: int, rotary: bool) -> int:
    """Rotary embedding, scores, softmax and weighted sum of one attention layer, and its inner
    norms.
    """
    shapes = _linears(module)
    queries, keys = _widths(shapes)
    v_dim = _number(_HEAD_DIM, module, model) or _config_head_dim(model)
    if not v_dim:
        raise ConfigError(
            f"{name}: found no head size; looked for {', '.join(_HEAD_DIM)} on "
            f"{type(module).__name__} and in the config"
        )
    heads = queries // v_dim
    # Multi-head latent attention has two sizes, and turns only a part of each query and one shared
    # key.
    qk_dim, rope = (
        getattr(module, n, otherwise)
        for n, otherwise in (("qk_head_dim", v_dim), ("qk_rope_head_dim", 0))
    )
    total = tokens * tokens * heads * (qk_dim + v_dim + 1)
    if rotary:
        total += 2 * tokens * ((heads + 1) * rope if rope else queries + keys)
    return total + tokens * _norms_per_head(module, v_dim, heads, keys // v_dim)


def _norms_per_head(module: nn.Module, dim: int, heads: int, kv_heads: int) -> int:
    """What q/k norms over one head cost beyond the single pass that `_norm_width` counts for each
    of them.
    """
    norms = [m for m in module.children() if _norm_width(m) == 2 * dim]
    return sum(2 * dim * (n - 1) for n, _ in zip((heads, kv_heads), norms))


def _widths(shapes: list[tuple[int, int]]) -> tuple[int, int]:
    """(H * D, G * D): the output map is the one whose inputs leave room for keys and values in what
    the other maps put out.
    """
    best = (shapes[-1][0], 0)
    for i in reversed(range(len(shapes))):
        rest = sum(out for j, (_, out) in enumerate(shapes) if j != i)
        keys = (rest - shapes[i][0]) // 2
        if keys > 0:
            return shapes[i][0], keys
    return best


def _config_head_dim(model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    hidden = getattr(config, "hidden_size", None)
    heads = getattr(config, "num_attention_heads", None)
    return hidden // heads if hidden and heads else 0
