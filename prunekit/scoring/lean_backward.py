"""Less memory for a backward: blocks that recompute what is cheap, and a loss in the memory of its
logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from prunekit.architecture.modes import forward_replaced

_SAVED = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def _policy(_ctx: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _SAVED else CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def lean_activations(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, the blocks keep only the results of matrix products for backward and recompute what
    is cheap.

    Costs a few percent of time (norms, rotations, activations run twice) and saves about two thirds
    of the activations.
    """
    lean = partial(
        checkpoint,
        use_reentrant=False,
        context_fn=partial(create_selective_checkpoint_contexts, _policy),
        preserve_rng_state=False,
    )
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(forward_replaced(block, partial(lean, block.forward)))
        yield


class _OneBufferLoss(torch.autograd.Function):
    """Cross entropy whose gradient takes the place of the logits: one (N, T, V) tensor instead of
    four.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        scores, targets = logits.detach()[:, :-1], labels[:, 1:].to(logits.device)
        count = targets.numel()
        # In float16 a small probability over so many tokens would be zero: the backward divides.
        ctx.divisor = count if logits.dtype is torch.float16 else 1
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        # A sample at a time: float32 copies of one row only.
        for row, target in zip(scores, targets, strict=True):
            log_p = torch.log_softmax(row.float(), -1)
            total -= log_p.gather(1, target[:, None]).sum()
            p = log_p.exp_()
            p.scatter_add_(1, target[:, None], torch.full_like(target[:, None], -1, dtype=p.dtype))
            row.copy_(p.div_(count // ctx.divisor))
        logits.detach()[:, -1] = 0
        ctx.gradient = logits.detach()
        return total / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(grad / ctx.divisor), None


@contextmanager
def lean_loss(model: nn.Module) -> Iterator[None]:
    """Inside, a model with transformers' ordinary causal loss computes it in the memory of its
    logits, which backward then consumes.

    The outputs' logits are overwritten, so only the loss of what the model returns may be used.
    Other losses are left as they are.
    """
    from transformers.loss.loss_utils import ForCausalLMLoss

    if getattr(model, "loss_function", None) is not ForCausalLMLoss:
        yield
        return

    def loss(logits: Tensor, labels: Tensor, vocab_size: int, **_: object) -> Tensor:
        found: Tensor = _OneBufferLoss.apply(logits, labels)  # type: ignore[no-untyped-call]
        return found

    model.loss_function = loss  # type: ignore[assignment]
    try:
        yield
    finally:
        del model._loss_function  # the class's own shows again
