"""Runs of several processes (torchrun, accelerate launch)."""

from __future__ import annotations

import os


def first_process() -> bool:
    """Under torchrun or accelerate launch every process runs the whole job, and only the first one
    writes what it found.
    """
    return int(os.environ.get("RANK", "0")) == 0


def several() -> bool:
    """Whether torchrun or accelerate launch started more processes for the same job."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join_others() -> None:
    """Lets the processes of torchrun or accelerate launch add up what each of them sees."""
    if not several():
        return
    import torch  # not where a sweep's jobs are only listed
    from torch import distributed

    if not distributed.is_initialized():
        # Statistics may lie in host memory where the model is on a GPU: gloo adds those up.
        both = torch.cuda.is_available()
        distributed.init_process_group("cpu:gloo,cuda:nccl" if both else "gloo")
