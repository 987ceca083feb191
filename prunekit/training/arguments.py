"""A recipe in the words of transformers' Trainer."""

from __future__ import annotations

import torch
from torch import nn
from transformers import TrainingArguments

from prunekit.training.recipe import Recipe, micro_batches, processes


def arguments(
    recipe: Recipe, folder: str, dtype: torch.dtype, device: torch.device, evaluate: bool
) -> TrainingArguments:
    """The recipe in the Trainer's words: nothing reported, one device for each process."""
    args = TrainingArguments(
        output_dir=folder,
        learning_rate=recipe.lr,
        warmup_steps=recipe.warmup_steps,
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps or -1,
        per_device_train_batch_size=recipe.micro_batch,
        per_device_eval_batch_size=recipe.micro_batch,
        gradient_accumulation_steps=micro_batches(recipe.batch, recipe.micro_batch),
        logging_steps=recipe.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=recipe.eval_every,
        prediction_loss_only=True,
        save_strategy="steps" if recipe.progress else "no",
        save_steps=recipe.save_every,
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=False,
        dataloader_pin_memory=device.type != "cpu",
        seed=recipe.seed,
        use_cpu=device.type == "cpu",
        bf16=dtype is torch.bfloat16,
        # The CPU has no mixed float16 and computes in the weights' own.
        fp16=dtype is torch.float16 and device.type != "cpu",
    )
    if args.n_gpu > 1:
        # DataParallel would multiply the batch by the GPUs that happen to be there; several
        # processes are the way.
        args._n_gpu = 1
    if device.index and processes() == 1:
        _train_on(args, device)
    return args


def _train_on(args: TrainingArguments, device: torch.device) -> None:
    """One process would take the first accelerator, wherever the model is."""
    torch.get_device_module(device).set_device(device)
    args.__dict__["_setup_devices"] = device  # a cached property, which `args.device` reads
    args.distributed_state.device = device


def weights_dtype(model: nn.Module) -> torch.dtype:
    """Of the frozen weights, or of all if none is frozen."""
    frozen = (p.dtype for p in model.parameters() if not p.requires_grad and p.is_floating_point())
    return next(frozen, next(model.parameters()).dtype)
