"""Training of weights where they stand: all of them or some."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor, nn

from prunekit.data.training_examples import Example
from prunekit.training.distillation import Distillation, Teacher
from prunekit.training.masked_low_rank import MaskedUpdates, masked_updates
from prunekit.training.recipe import Recipe
from prunekit.training.zeros import apply_masks

if TYPE_CHECKING:
    from prunekit.training.trainer import History


def train_weights(
    model: nn.Module,
    names: Collection[str] | None,
    examples: Sequence[Example],
    validation: Sequence[Example],
    recipe: Recipe,
    keep: Mapping[str, Tensor],
    *,
    updates: MaskedUpdates | None = None,
    teacher: Teacher | None = None,
    distillation: Distillation | None = None,
) -> tuple[History, int]:
    """Trains the parameters `names`, or all (None), and `updates` of others, in float32: updates of
    1e-4 vanish in less. What `keep` says is zero stays so. Returns the history and how many
    parameters were trained.

    teacher, distillation: those of `train`.
    """
    from transformers import set_seed

    from prunekit.training.trainer import train

    set_seed(recipe.seed)  # the updates start at random
    with in_float32(model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(names is None or name in names)
        with masked_updates(model, updates, keep):
            here = {name for name, _ in model.named_parameters()}
            history = train(
                model,
                examples,
                recipe,
                validation=validation,
                keep={name: mask for name, mask in keep.items() if name in here},
                teacher=teacher,
                distillation=distillation,
            )
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    apply_masks(model, keep)
    return history, trained


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Inside, every floating-point tensor of the model is float32; afterwards each has its own type
    again, and requires gradients as before.
    """

    def tensors() -> dict[str, Tensor]:
        return dict(model.named_parameters()) | dict(model.named_buffers())

    before = {name: (t.dtype, t.requires_grad) for name, t in tensors().items()}
    model.float()
    try:
        yield
    finally:
        after = tensors()
        for name, (dtype, grad) in before.items():
            after[name].data = after[name].data.to(dtype)
            after[name].requires_grad_(grad)


def is_norm(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is the weight of a norm: of all that has one axis, what is no bias."""
    return parameter.dim() == 1 and name.rpartition(".")[2] != "bias"
