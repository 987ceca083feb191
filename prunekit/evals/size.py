"""How big a model is: parameters and what its weights take."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from prunekit.registry import evals


@evals.register()
def size(model: nn.Module, tokenizer: Any) -> dict[str, float]:
    """Parameters, those that are not zero, those outside of the embeddings, and the MiB of the
    weights.

    Tied tensors count once. `params_without_embedding` leaves out every nn.Embedding and the output
    projection to the vocabulary. `weights_mib` is what parameters take in their own dtype. On the
    meta device there is nothing to compare with zero, so `params_nonzero` is left out.
    """
    parameters = list(model.parameters())
    out = {
        "params": sum(p.numel() for p in parameters),
        "params_without_embedding": sum(p.numel() for p in without_embedding(model)),
        "weights_mib": sum(p.numel() * p.element_size() for p in parameters) / 2**20,
    }
    if not any(p.is_meta for p in parameters):
        # One tensor at a time and summed as integers: a count over 2**31 elements overflows no
        # float32 here.
        out["params_nonzero"] = sum(int(p.count_nonzero()) for p in parameters)
    return out


def without_embedding(model: nn.Module) -> list[Tensor]:
    """The model's parameters less token and position embeddings and the output projection (tied or
    not).
    """
    left_out = {
        id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
    }
    head = getattr(model, "get_output_embeddings", lambda: None)()
    left_out |= {id(p) for p in head.parameters()} if head is not None else set()
    return [p for p in model.parameters() if id(p) not in left_out]
