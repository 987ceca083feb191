"""Models of which accelerate keeps a part in host memory or on disk: whole while they are pruned,
spread again afterwards.

Such a model holds empty placeholders, which its hooks fill for the length of a forward: enough to
measure, not to take gradients (a backward needs every weight where it was), nor to remove anything
from. Pruning therefore happens in host memory, on the CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
from torch import nn

from prunekit.errors import ConfigError

log = logging.getLogger(__name__)


def away(model: nn.Module) -> list[str]:
    """Names of the parameters that are not in memory."""
    return [n for n, p in model.named_parameters() if p.is_meta]


def fits(model: nn.Module) -> None:
    """Raises ConfigError if parts of the model are kept elsewhere and the whole has no place in
    this machine's memory.
    """
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    total = psutil.virtual_memory().total
    if away(model) and size > total:
        raise ConfigError(
            "model.device_map leaves weights in host memory or on disk; to prune, all "
            f"{size / 2**30:.1f} GiB come into host memory, "
            f"and there are {total / 2**30:.1f} GiB: give more devices, a smaller model.dtype, or "
            "more memory"
        )


@contextmanager
def in_memory(model: nn.Module) -> Iterator[None]:
    """Inside, every weight is in host memory if some were kept elsewhere; afterwards what is left
    is spread over the same accelerators.
    """
    missing = away(model)
    if not missing:
        yield
        return
    log.info(
        "%d of the weights are kept elsewhere: the model is pruned in host memory", len(missing)
    )
    places = set(getattr(model, "hf_device_map", {}).values()) - {"cpu", "disk"}
    gather(model)
    yield
    if places:
        spread(model)


def gather(model: nn.Module) -> None:
    """All weights into host memory, as ordinary tensors, and accelerate's hooks off the model.
    Raises ConfigError where one is lost.
    """
    from accelerate.hooks import remove_hook_from_submodules
    from accelerate.utils import set_module_tensor_to_device

    kept: dict[str, Any] = {}
    for prefix, module in model.named_modules():
        maps = [
            h.weights_map
            for h in hooks(module)
            if getattr(h, "offload", False) and h.weights_map is not None
        ]
        for name, tensor in module._parameters.items():
            if tensor is not None and tensor.is_meta:
                kept[f"{prefix}.{name}" if prefix else name] = next(
                    (m[name] for m in maps if name in m), None
                )
    lost = [name for name, value in kept.items() if value is None]
    if lost:
        raise ConfigError(
            f"{len(lost)} weights are neither in memory nor known to accelerate: "
            f"{', '.join(lost[:3])}"
        )
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    remove_hook_from_submodules(model)
    for name, value in kept.items():
        set_module_tensor_to_device(model, name, "cpu", value=value.clone())
    for module in model.modules():
        if getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward:
            del module.forward  # accelerate leaves the class's own method on the instance
    model.__dict__.pop("hf_device_map", None)
    model.to("cpu")
    if hasattr(model, "tie_weights"):
        model.tie_weights()  # type: ignore[operator]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags.get(name, True))


def hooks(module: nn.Module) -> list[Any]:
    """What accelerate has put around a module's forward; several hooks stand in one that runs them
    in order.
    """
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def spread(model: nn.Module) -> None:
    """Over the accelerators that there are, and host memory for what does not fit, as
    `device_map=auto` does.
    """
    from accelerate import dispatch_model, infer_auto_device_map

    whole = getattr(model, "_no_split_modules", None)
    dispatch_model(
        model,
        infer_auto_device_map(model, no_split_module_classes=sorted(whole) if whole else None),
    )
