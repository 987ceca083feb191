"""Where a model goes: names of devices that this machine has."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import AfterValidator


def existing_device(name: str | None) -> str | None:
    """`name`, if weights can be put there; None is left to the model. Raises ValueError."""
    if name is None:
        return None
    kinds = ["cpu"]
    if torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        kind = accelerator.type if accelerator is not None else "cpu"
        kinds += [kind, *(f"{kind}:{i}" for i in range(torch.accelerator.device_count()))]
    if name not in kinds:
        raise ValueError(f"this machine has {', '.join(kinds)}")
    return name


Device = Annotated[str | None, AfterValidator(existing_device)]
"""Type of the option `device`."""
