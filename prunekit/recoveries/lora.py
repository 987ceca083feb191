"""LoRA (Hu et al., arXiv 2106.09685) as LLM-Pruner recovers with it (arXiv 2305.11627, README
recipe), merged at the end.
"""

from __future__ import annotations

from fnmatch import fnmatch
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from prunekit.data.training_examples import Source, held_out, load
from prunekit.errors import ConfigError
from prunekit.registry import Natural, Positive, Share, recoveries
from prunekit.types import Pruned, tensor_of

Rate = Annotated[float, Field(gt=0)]


@recoveries.register(paper="arXiv 2106.09685", year=2021, needs="data", out="self-contained")
def lora(
    pruned: Pruned,
    tokenizer: Any,
    *,
    dataset: Source = "alpaca",
    split: str | None = None,
    path: str | None = None,
    data_root: str | None = None,
    cutoff: Positive = 256,
    holdout: Natural = 2000,
    r: Positive = 8,
    alpha: Positive = 16,
    dropout: Share = 0.05,
    targets: list[str] | None = None,
    lr: Rate = 1e-4,
    warmup_steps: Natural = 100,
    epochs: Rate = 2,
    max_steps: Positive | None = None,
    batch: Positive = 64,
    micro_batch: Positive = 4,
    eval_every: Positive = 100,
    log_every: Positive = 10,
    seed: Natural = 42,
) -> nn.Module:
    """Low-rank updates of all linear layers, trained on instructions or plain text and merged into
    the weights.

    Linear layers are all those inside of the decoder's blocks; `targets` narrows them to names or
    glob patterns (`q_proj`, `*.mlp.*`). With `holdout` examples set aside, the updates with the
    lowest loss on them are merged, else the last ones. Zeros of weights-groups in `pruned.kept` are
    put back after merging: what the update would have written there is lost. Leaves
    `recovery_curve` (step, loss, learning_rate, grad_norm, eval_loss), `recovery_best_step`,
    `recovery_examples` and `recovery_trained_params` in `pruned.notes`. Raises ConfigError for
    targets that match nothing or data that holds nothing.
    """
    from transformers import set_seed

    from prunekit.training.trainer import Recipe, accumulation, fit

    model = pruned.model
    recipe = Recipe(
        lr, warmup_steps, epochs, max_steps, batch, micro_batch, eval_every, log_every, seed
    )
    names = linears(model, targets)
    accumulation(batch, micro_batch)  # said before the data is read
    train, held = held_out(load(tokenizer, dataset, split, path, data_root, cutoff), holdout, seed)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    set_seed(seed)  # the updates start at random
    inject(model, names, r, alpha, dropout)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    curve, best = fit(model, train, held, recipe)
    merge(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags[name])
    keep_zeros(pruned)
    pruned.notes |= {
        "recovery_curve": curve,
        "recovery_best_step": best,
        "recovery_examples": len(train),
        "recovery_trained_params": trained,
    }
    return model


def linears(model: nn.Module, targets: list[str] | None = None) -> list[str]:
    """Names of the linear layers (nn.Linear, transformers' Conv1D) in the blocks: the module list
    that holds most of the parameters.

    Raises ConfigError where there is none, or none that `targets` matches, naming those there are.
    """
    from transformers.pytorch_utils import Conv1D

    stacks = {
        name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)
    }
    if not stacks:
        raise ConfigError(
            f"{type(model).__name__} has no list of blocks (nn.ModuleList) whose linear layers "
            "LoRA could update"
        )
    # The outermost of equals comes first: a list inside of a block holds less than the list of
    # blocks.
    blocks = max(stacks, key=lambda name: sum(p.numel() for p in stacks[name].parameters()))
    found = [
        f"{blocks}.{n}"
        for n, m in stacks[blocks].named_modules()
        if isinstance(m, (nn.Linear, Conv1D)) and m.weight.numel()
    ]
    chosen = [
        n
        for n in found
        if targets is None or any(n.rpartition(".")[2] == t or fnmatch(n, t) for t in targets)
    ]
    if not chosen:
        possible = ", ".join(sorted({n.rpartition(".")[2] for n in found})) or "none at all"
        raise ConfigError(
            f"targets={targets} match no linear layer of the blocks; their names end in: {possible}"
        )
    return chosen


def inject(model: nn.Module, names: list[str], r: int, alpha: int, dropout: float) -> None:
    """Puts float32 low-rank updates on the named layers and freezes all else."""
    from peft import LoraConfig, inject_adapter_in_model

    transposed = not isinstance(model.get_submodule(names[0]), nn.Linear)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        bias="none",
        target_modules=names,
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


@torch.no_grad()
def keep_zeros(pruned: Pruned) -> None:
    """Elements that `kept` says are removed, of groups of kind `weights`, are zero again."""
    for group in pruned.groups:
        if group.kind == "weights" and group.name in pruned.kept:
            weight = tensor_of(pruned.model, group.members[0].param)
            weight.masked_fill_(~pruned.kept[group.name].view_as(weight).to(weight.device), 0)
