"""Training whose weights lie in shards on several processes: FSDP2 as `accelerate launch` sets it
up (Zhao et al., arXiv 2304.11277; torch's `fully_shard`).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from prunekit.errors import ConfigError
from prunekit.training.recipe import processes

if TYPE_CHECKING:
    from prunekit.training.callbacks import Best


def wants_shards() -> bool:
    """Whether the launcher asks for shards. Raises ConfigError for the first version of FSDP."""
    if processes() == 1:
        return False
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ConfigError(f"fsdp_version={version} in accelerate's configuration; possible: 2")
    return True


def training_device(model: nn.Module) -> torch.device:
    """Where a model is trained: where it is, but shards lie where the launcher says, so that the
    whole of a large model can stay in host memory.
    """
    device = next(model.parameters()).device
    if not wants_shards():
        return device
    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true":
        return torch.device("cpu")
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def on_same_memory(model: nn.Module) -> nn.Module:
    """A copy of the modules whose parameters and buffers are the model's own memory. What is put
    into shards is the copy, so that nothing of it is left on the model.

    Raises ConfigError for a model that lies on several devices.
    """
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise ConfigError("FSDP puts the model on its devices itself: model.device_map=null")
    memo: dict[int, Any] = {id(b): b.detach() for b in model.buffers()}
    memo |= {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo)


class Shards(TrainerCallback):
    """The trained parameters of `sharded`, a copy of `model`, while they lie in shards.

    keep: parameter name -> bool tensor of its shape, True = free, as `train` takes it.
    best: keeps copies of what it is told is trained: of this process's shards.
    """

    def __init__(self, model: nn.Module, keep: Mapping[str, Tensor], best: Best):
        self.model, self.keep, self.best = model, keep, best
        self.trained: dict[str, Any] = {}
        self.zero: dict[str, Tensor] = {}
        self.teacher: nn.Module | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        from torch.distributed.tensor import distribute_tensor

        wrapped = "_checkpoint_wrapped_module."
        self.trained = {
            name.replace(wrapped, ""): p for name, p in model.named_parameters() if p.requires_grad
        }
        self.best.trained = [p.detach().to_local() for p in self.trained.values()]
        for name in self.keep.keys() & self.trained.keys():
            p = self.trained[name]
            zero = ~self.keep[name].to(p.to_local().device)
            # Every process has the whole mask: nothing need be sent.
            part = distribute_tensor(zero, p.device_mesh, p.placements, src_data_rank=None)
            self.zero[name] = part.to_local()

    @torch.no_grad()
    def clear_masked_gradients(self) -> None:
        """After a backward: no gradient reaches what is held at zero. Hooks on the parameters, as
        `zeros.held_at_zero` has them, are not called for shards.
        """
        for name, zero in self.zero.items():
            if self.trained[name].grad is not None:
                self.trained[name].grad.to_local().masked_fill_(zero, 0)

    @torch.no_grad()
    def gather(self) -> None:
        """Writes the trained parameters into the model, in each process the whole of them."""
        for name, p in self.trained.items():
            whole = p.detach().to(p.device_mesh.device_type).full_tensor()
            self.model.get_parameter(name).copy_(whole)

    def teacher_of(self, whole: nn.Module, accelerator: Any) -> nn.Module:
        """A copy of the teacher in shards like those of the student, which is prepared already."""
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        if self.teacher is None:
            self.teacher = fsdp2_prepare_model(accelerator, on_same_memory(whole))
        return self.teacher


class ShardingTrainer(Trainer):
    """The Trainer, which leaves shards to accelerate, on CPUs too, with what they lack added."""

    shards: Shards | None = None

    def create_accelerator_and_postprocess(self) -> None:
        """accelerate takes FSDP for accelerators alone and would train whole copies on CPUs;
        torch's shards do not mind.
        """
        from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if wants_shards() and state.distributed_type is DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin()
            self.is_fsdp_enabled = True

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.shards:
            self.shards.clear_masked_gradients()
        return loss
