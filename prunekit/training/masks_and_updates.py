"""Masks learned together with weights (Sheared LLaMA) or with low-rank updates of frozen weights
(Compresso, NutePrune).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from prunekit.data.training_examples import Example
from prunekit.training.constraints import Constraint
from prunekit.training.learned_masks import LearnedMasks
from prunekit.training.low_rank import Updates, low_rank_updates
from prunekit.training.recipe import Recipe

if TYPE_CHECKING:
    from prunekit.training.resume import Stateful
    from prunekit.training.trainer import History


def learn(
    masks: LearnedMasks,
    examples: Sequence[Example],
    recipe: Recipe,
    constraint: Constraint,
    mask_lr: float,
    *,
    beside: Sequence[Stateful] = (),
    **objective: Any,
) -> History:
    """Trains masks, on their model already, and what requires gradients in it.

    beside: what else must be as it was for a training that goes on.
    objective: of `train`, instead of the loss and the constraint.
    """
    from prunekit.training.trainer import train

    return train(
        masks.model,
        examples,
        recipe,
        parameters=constraint.parameters(mask_lr),
        beside=[masks, *beside],
        callbacks=constraint.callbacks(),
        **({"penalty": constraint} | objective),
    )


def learn_with_updates(
    masks: LearnedMasks,
    updates: Updates,
    examples: Sequence[Example],
    recipe: Recipe,
    constraint: Constraint,
    mask_lr: float,
    objective: Callable[[list[nn.Parameter]], AbstractContextManager[dict[str, Any]]] | None = None,
) -> list[dict[str, Any]]:
    """Trains masks and low-rank updates of frozen weights, and merges the updates. Returns the
    curve.

    objective: of the updates' parameters, a context in which `learn` takes what it gives.
    """
    model = masks.model
    with masks.on_model(), low_rank_updates(model, updates, recipe.seed):
        gates_around_updates(model)
        learnt = [p for p in model.parameters() if p.requires_grad]
        given = nullcontext({}) if objective is None else objective(learnt)
        with given as how:
            history = learn(masks, examples, recipe, constraint, mask_lr, **how)
    return history.curve


def gates_around_updates(model: nn.Module) -> None:
    """Gates on a linear module move to the layer that adds the update: they are for both."""
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            outer, inner = cast(nn.Module, module), module.get_base_layer()
            for hooks in ("_forward_hooks", "_forward_pre_hooks"):
                there, here = getattr(inner, hooks), getattr(outer, hooks)
                setattr(outer, hooks, there)
                setattr(inner, hooks, here)
