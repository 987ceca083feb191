"""Low-rank updates of linear layers (Hu et al., arXiv 2106.09685): put in, trained, merged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from prunekit.data.training_examples import Example
from prunekit.errors import ConfigError
from prunekit.training.distillation import Distillation, Teacher
from prunekit.training.recipe import Recipe
from prunekit.training.zeros import apply_masks

if TYPE_CHECKING:
    from prunekit.training.trainer import History


class Updates(NamedTuple):
    """Low-rank updates `alpha / r * B A` of the linear layers of these names."""

    names: Sequence[str]
    r: int
    alpha: int
    dropout: float


def train_and_merge(
    model: nn.Module,
    updates: Updates,
    examples: Sequence[Example],
    validation: Sequence[Example],
    recipe: Recipe,
    keep: Mapping[str, Tensor],
    teacher: Teacher | None = None,
    distillation: Distillation | None = None,
) -> tuple[History, int]:
    """Trains the updates and adds them to the weights; what requires gradients is as it was, and
    what `keep` says is zero. Returns the history and how many parameters were trained.

    teacher, distillation: those of `train`.
    """
    from prunekit.training.trainer import train

    with low_rank_updates(model, updates, recipe.seed):
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        history = train(
            model,
            examples,
            recipe,
            validation=validation,
            keep=factor_masks(model, updates.names, keep),
            teacher=teacher,
            distillation=distillation,
        )
    apply_masks(model, keep)
    return history, trained


@contextmanager
def low_rank_updates(model: nn.Module, updates: Updates, seed: int) -> Iterator[None]:
    """Inside, updates that start at random require gradients and all else is frozen; afterwards
    they are part of the weights, which require gradients as before.
    """
    from transformers import set_seed

    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    set_seed(seed)
    inject(model, updates)
    yield
    merge(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags[name])


def check_updates(model: nn.Module, names: Sequence[str]) -> None:
    """Raises ConfigError naming a linear layer that peft puts no updates on in models of this kind
    (Mamba's `out_proj`, whose kernel reads the weight past the layer).
    """
    from peft import LoraConfig, inject_adapter_in_model

    leaves = sorted({name.rpartition(".")[2] for name in names})
    for leaf in leaves:
        alone: Any = nn.Module()
        alone.config = getattr(model, "config", None)
        setattr(alone, leaf, nn.Linear(1, 1, device="meta"))
        try:
            inject_adapter_in_model(LoraConfig(r=1, target_modules=[leaf]), alone)
        except ValueError:
            others = ", ".join(n for n in leaves if n != leaf)
            raise ConfigError(
                f"low-rank updates cannot be on {leaf} of {type(model).__name__}; name others in "
                f"recovery.targets, of {others}"
            ) from None


def inject(model: nn.Module, updates: Updates) -> None:
    """Puts float32 low-rank updates on the named layers and freezes all else."""
    from peft import LoraConfig, inject_adapter_in_model

    transposed = not isinstance(model.get_submodule(updates.names[0]), nn.Linear)
    config = LoraConfig(
        r=updates.r,
        lora_alpha=updates.alpha,
        lora_dropout=updates.dropout,
        bias="none",
        target_modules=list(updates.names),
        fan_in_fan_out=transposed,
    )
    inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()  # updates of 1e-4 vanish in bfloat16


def merge(model: nn.Module) -> None:
    """Adds the updates to the weights and puts the original layers back, so that nothing of peft is
    left.
    """
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    del model.peft_config


def factor_masks(
    model: nn.Module, names: Sequence[str], keep: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Masks of the factors of the updates on the named layers, so that `B A` is zero in the rows
    and columns that are zero as a whole.

    keep: masks of the weights, stored as the weights are.
    """
    masks: dict[str, Tensor] = {}
    for name in names:
        layer: Any = model.get_submodule(name)
        if f"{name}.weight" not in keep:
            continue
        stored = keep[f"{name}.weight"]
        mask = stored if isinstance(layer.get_base_layer(), nn.Linear) else stored.T  # (out, in)
        for factor, free in (("lora_A", mask.any(0)[None, :]), ("lora_B", mask.any(1)[:, None])):
            if not free.all():
                weight = f"{name}.{factor}.default.weight"
                masks[weight] = free.expand_as(model.get_parameter(weight))
    return masks
