"""Models that accelerate spreads over devices, host memory and disk: whole while they are pruned,
spread again afterwards, and readable weight by weight while they are saved. And models whose
weights lie in mapped files (`model.weights=disk`), which never are in memory as a whole.

What such a model keeps elsewhere are empty placeholders, which its hooks fill for the length of a
forward: enough to measure, not to take gradients (a backward needs every weight where it was), nor
to remove anything from. Pruning therefore happens in host memory, on the CPU.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from prunekit.architecture.blocks import block_modules
from prunekit.architecture.compute import (
    compute_as_stored,
    compute_in_float32,
    computes_in_float32,
)
from prunekit.architecture.mapped import is_mapped, mapped, mapped_copy, release
from prunekit.architecture.streaming import cover, device_of, streaming
from prunekit.errors import ConfigError
from prunekit.types import tensor_of

log = logging.getLogger(__name__)


def offloaded(model: nn.Module) -> list[str]:
    """Names of the parameters and saved buffers that are not in memory."""
    named: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    return [name for name, tensor in named if tensor.is_meta]


def check_fits_in_memory(model: nn.Module) -> None:
    """Raises ConfigError if parts of the model are kept elsewhere and the whole has no place in
    this machine's memory.
    """
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    total = psutil.virtual_memory().total
    if offloaded(model) and size > total:
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
    missing = offloaded(model)
    if not missing:
        yield
        return
    log.info(
        "%d of the weights are kept elsewhere: the model is pruned in host memory", len(missing)
    )
    device_map: Any = getattr(model, "hf_device_map", {})
    accelerators = set(device_map.values()) - {"cpu", "disk"}
    gather(model)
    yield
    if accelerators:
        dispatch(model)


def gather(model: nn.Module, copied: Callable[[Tensor], Tensor] = torch.clone) -> None:
    """All weights into host memory, as ordinary tensors, and accelerate's hooks off the model;
    `copied` puts each where it is to stay. Raises ConfigError where one is lost.
    """
    from accelerate.hooks import remove_hook_from_submodules
    from accelerate.utils import set_module_tensor_to_device

    values = {
        name: copied(stored_value(model, name).to(tensor_of(model, name).dtype))
        for name in offloaded(model)
    }
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    remove_hook_from_submodules(model)
    for name, value in values.items():
        set_module_tensor_to_device(model, name, "cpu", value=value)
    for module in model.modules():
        if getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward:
            del module.forward  # accelerate leaves the class's own method on the instance
    model.__dict__.pop("hf_device_map", None)
    model.to("cpu")
    retie(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags.get(name, True))


def stored_value(model: nn.Module, name: str) -> Tensor:
    """The value of a parameter or buffer that accelerate keeps in host memory or on disk, or that
    lies in a mapped file. Raises ConfigError where no hook knows it.
    """
    here = tensor_of(model, name)
    if not here.is_meta:
        copied = here.detach().clone()
        release([here])
        return copied
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        module = model.get_submodule(".".join(parts[:depth]))
        for hook in hooks(module):
            if getattr(hook, "offload", False) and hook.weights_map is not None:
                try:
                    value: Tensor = hook.weights_map[".".join(parts[depth:])]
                except KeyError:
                    continue
                return value
    raise ConfigError(f"the weight {name} is neither in memory nor known to accelerate")


def hooks(module: nn.Module) -> list[Any]:
    """What accelerate has put around a module's forward; several hooks stand in one that runs them
    in order.
    """
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def input_device(model: nn.Module) -> torch.device | None:
    """Where token ids go; None for a model on the meta device, which cannot run."""
    for module in model.modules():
        for hook in hooks(module):
            if getattr(hook, "execution_device", None) is not None:
                return torch.device(hook.execution_device)
    device = device_of(model)
    return None if device.type == "meta" else device


def put_beside(other: nn.Module, model: nn.Module) -> nn.Module:
    """`other` where `model` is; one that accelerate spread stays where its hooks expect it."""
    if offloaded(other) or len(set(getattr(other, "hf_device_map", {}).values())) > 1:
        return other
    return other.to(next(model.parameters()).device)


@contextmanager
def placed_like(model: nn.Module, duplicate: nn.Module) -> Iterator[None]:
    """Inside, accelerate moves weights and activations of `duplicate` as it does those of `model`,
    mapped weights leave memory after each block, and half precision is computed in float32 as in
    `model`.

    Both have the same modules and hold the very same tensors.
    """
    from accelerate.hooks import add_hook_to_module, remove_hook_from_submodules

    paths = [path for path, module in model.named_modules() if hooks(module)]
    for path in paths:
        hook: Any = model.get_submodule(path)._hf_hook
        add_hook_to_module(duplicate.get_submodule(path), _duplicate_hook(hook))
    releasing = release_after_forward(duplicate) if mapped(model) else []
    releasing += cover(duplicate, streaming(model))
    if computes_in_float32(model):
        compute_in_float32(duplicate)
    try:
        yield
    finally:
        compute_as_stored(duplicate)
        for handle in releasing:
            handle.remove()
        if paths:
            remove_hook_from_submodules(duplicate)
            retie(duplicate)


def _duplicate_hook(hook: Any) -> Any:
    """The hook without what it remembers of its module; the weights that it knows are shared."""
    new = copy.copy(hook)
    if hasattr(hook, "hooks"):
        new.hooks = tuple(_duplicate_hook(one) for one in hook.hooks)
    if hasattr(hook, "tied_params_names"):
        new.tied_params_names = set(hook.tied_params_names)
    return new


def lend_weights(model: nn.Module, duplicate: nn.Module) -> None:
    """Let `duplicate.save_pretrained` write the weights that accelerate keeps elsewhere for
    `model`: it reads them one shard at a time.

    `duplicate` has the modules of `model`, and serves for nothing else afterwards.
    """
    placeholders: dict[Tensor, nn.Parameter] = {}
    for module in duplicate.modules() if mapped(model) else ():
        for leaf, parameter in module._parameters.items():
            if parameter is not None and is_mapped(parameter):
                empty = nn.Parameter(torch.empty_like(parameter, device="meta"), False)
                module._parameters[leaf] = placeholders.setdefault(parameter, empty)
    elsewhere = [name for name, tensor in duplicate.state_dict().items() if tensor.is_meta]
    for path in {name.rpartition(".")[0] for name in elsewhere}:
        owner: Any = duplicate.get_submodule(path)
        owner._hf_hook = SimpleNamespace(weights_map=_Stored(model, path))
    if elsewhere:
        duplicate.hf_device_map = {"": "disk"}  # type: ignore[assignment]


class _Stored:
    """The weights of one module of `model`, each read when it is asked for."""

    def __init__(self, model: nn.Module, path: str):
        self.model, self.path = model, path

    def __getitem__(self, leaf: str) -> Tensor:
        return stored_value(self.model, f"{self.path}.{leaf}" if self.path else leaf)


def retie(model: nn.Module) -> None:
    """Tie again what moving weights one by one has parted."""
    tie: Any = getattr(model, "tie_weights", None)
    if tie is not None:
        tie()


def dispatch(model: nn.Module) -> None:
    """Over the accelerators that there are, and host memory for what does not fit, as
    `device_map=auto` does.
    """
    from accelerate import dispatch_model, infer_auto_device_map

    whole: Any = getattr(model, "_no_split_modules", None)
    dispatch_model(
        model,
        infer_auto_device_map(model, no_split_module_classes=sorted(whole) if whole else None),
    )


def map_weights(model: nn.Module) -> None:
    """All parameters into files, one at a time, from memory or from where accelerate keeps them;
    blocks and embeddings release them after each forward.
    """
    gather(model, mapped_copy)
    for parameter in model.parameters():
        if not is_mapped(parameter):
            parameter.data = mapped_copy(parameter.data)
    release_after_forward(model)


def release_after_forward(model: nn.Module) -> list[Any]:
    """The hooks that keep no more than about one block of a mapped model resident."""
    ends = [getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    return [
        module.register_forward_hook(_release)
        for module in (*block_modules(model), *ends)
        if module is not None
    ]


def _release(module: nn.Module, args: Any, out: Any) -> None:
    release(module.parameters())


def disk_map(outline: nn.Module) -> dict[str, int | str]:
    """accelerate's `device_map` by which all of a model but its embedding, which accelerate wants
    at hand, stays in the checkpoint's files. `outline`: the model on the meta device.
    """
    embedding: Any = outline.get_input_embeddings()  # type: ignore[operator]
    home = next(name for name, module in outline.named_modules() if module is embedding)
    places: dict[str, int | str] = {}

    def place(module: nn.Module, path: str) -> None:
        for leaf, child in module.named_children():
            name = f"{path}.{leaf}" if path else leaf
            if home.startswith(name + "."):
                place(child, name)
            else:
                places[name] = "cpu" if name == home else "disk"

    place(outline, "")
    return places
