"""Any causal language model that transformers can load: a folder on disk or a name on the Hugging
Face hub.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from prunekit.architecture import offload
from prunekit.architecture.compute import compute_in_float32
from prunekit.architecture.mapped import check_mappable
from prunekit.architecture.streaming import stream
from prunekit.checkpoint import load, outline
from prunekit.checkpoint.class_sizes import REFUSALS
from prunekit.checkpoint.folder import check_plain
from prunekit.checkpoint.manifest import MANIFEST
from prunekit.errors import ConfigError, expanded
from prunekit.models import default_device, resolved_dtype
from prunekit.models.devices import Device
from prunekit.registry import models

Weights = Literal["memory", "host", "disk"]
AUTO = Literal["AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel"]


def _lost(path: str, error: Exception) -> ConfigError:
    """Neither a folder nor the hub gave the model; say both and why."""
    reason = str(error).strip().split("\n")[0]
    return ConfigError(
        f"model=hf: path={path!r} is neither a folder of this machine nor a model that the hub "
        f"gave ({type(error).__name__}: {reason}). "
        "Give a downloaded folder (config.json, safetensors, tokenizer), or a hub name with the "
        "network on and, if gated, a login."
    )


def _config(path: str, overrides: dict[str, Any] | None, options: dict[str, Any]) -> Any:
    """The model's configuration from where its weights are, else from `overrides`. Raises
    ConfigError.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if overrides and not Path(path).is_dir():
        if "model_type" not in overrides:
            raise ConfigError(
                f"model=hf: config needs a model_type (llama, qwen2, ...), got {sorted(overrides)}"
            )
        try:
            return AutoConfig.for_model(**overrides)
        except (*REFUSALS, StrictDataclassError) as e:
            raise ConfigError(f"model=hf: config={overrides}: {' '.join(str(e).split())}") from e
    try:
        return AutoConfig.from_pretrained(path, **options)
    except (*REFUSALS, StrictDataclassError, OSError) as e:
        raise _lost(path, e) from e


def _pruned(
    path: str, dtype: str, device: str | None, device_map: Any, meta: bool
) -> tuple[nn.Module, Any]:
    """A checkpoint of prunekit itself, whose layers may differ in width. Raises ConfigError for
    what only stock checkpoints can do.
    """
    if device_map is not None:
        raise ConfigError(
            f"model=hf: {path} is a checkpoint of prunekit: it is loaded whole onto one device, "
            "without device_map"
        )
    if meta:
        return outline(path), _tokenizer_at_hand(path, {"trust_remote_code": False})
    return load(
        path,
        dtype=None if dtype == "auto" else dtype,
        device=device or default_device(),
    )


def _check_weights(path: str, device: str | None, device_map: Any, weights: Weights) -> None:
    """Raises ConfigError for what cannot rest where `weights` says."""
    if weights == "memory":
        return
    if device_map is not None:
        raise ConfigError(
            f"model.weights={weights} brings blocks to one device in turn, and device_map spreads "
            "them over several: give model.device_map=null"
        )
    if weights == "host":
        if device == "cpu":
            raise ConfigError(
                "model.weights=host keeps in host memory what computes on an accelerator, and the "
                "device is the CPU: give model.weights=memory, or disk"
            )
        return
    check_mappable()
    if (expanded(path) / MANIFEST).is_file():
        raise ConfigError(
            f"model=hf: {path} is a checkpoint of prunekit, which is read whole: give "
            "model.weights=memory or host"
        )


def _read(
    loader: Any, path: str, config: Any, weights: str, device_map: Any, options: dict[str, Any]
) -> tuple[nn.Module, Any]:
    """Model and tokenizer from where they are. Raises ConfigError where neither disk nor hub has
    them.
    """
    from safetensors import SafetensorError
    from transformers import AutoTokenizer

    named = {k: v for k, v in options.items() if k != "dtype"}
    with tempfile.TemporaryDirectory(prefix="prunekit-") as scratch:
        more: dict[str, Any] = {"device_map": device_map}
        if weights == "disk":
            with torch.device("meta"):
                shapes = loader.from_config(config, trust_remote_code=named["trust_remote_code"])
            # Into the scratch folder go the weights that transformers stacks anew (experts).
            more = {"device_map": offload.disk_map(shapes), "offload_folder": scratch}
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, **named)
            model = loader.from_pretrained(path, **more, **options)
        except (*REFUSALS, SafetensorError, OSError, ImportError) as e:
            raise _lost(path, e) from e
        if weights == "disk":
            offload.map_weights(model)
    return model, tokenizer


def _settled(
    model: nn.Module, weights: Weights, device: str | None, device_map: Any, compute: str | None
) -> nn.Module:
    """The model where it is to compute, from where its weights are to rest."""
    place = device or default_device()
    if device_map is None and not next(model.parameters()).is_meta:
        if weights == "memory":
            model = model.to(place)
        elif place != "cpu":
            stream(model, place)
    if compute is not None:
        compute_in_float32(model)
    return model.eval()


def _tokenizer_at_hand(path: str, options: dict[str, Any]) -> Any:
    """The tokenizer, if no network is needed for it: text can be judged before weights are read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, **options)
    except (*REFUSALS, OSError, ImportError):
        return None  # what is wrong with it is said when the model is loaded


@models.register()
def hf(
    meta: bool = False,
    *,
    path: str,
    dtype: Literal["auto", "fast", "float32", "bfloat16", "float16"] = "auto",
    device: Device = None,
    device_map: str | dict[str, int | str] | None = None,
    weights: Weights = "memory",
    compute: Literal["float32"] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    auto: AUTO = "AutoModelForCausalLM",
    config: dict[str, Any] | None = None,
) -> tuple[nn.Module, Any]:
    """Any model that transformers loads, and prunekit's own checkpoints: `path` is a local folder
    or a hub name.

    `device_map` (`auto` spreads over all GPUs) takes the place of `device`. `weights=disk` keeps
    a copy of them, the one that is pruned, in mapped files on the disk (folder TMPDIR, as much room
    as the model takes): no more than about one block at a time is in memory. `weights=host` keeps
    them in host memory. With an accelerator as `device`, each block is there for its turn only
    (`architecture.streaming`). `compute=float32` runs half-precision weights in float32, converting
    one block at a time. `config` (a `model_type` and sizes) serves `meta=True` where no folder is
    at hand, so that a plan needs no network. Raises ConfigError where neither disk nor hub has the
    model, for a `revision` of a folder, for a device or a `compute` beside a map, for a `compute`
    of float32 weights, and for weights that cannot rest where `weights` says.
    """
    import transformers

    dtype_name = resolved_dtype(dtype, device)
    _check_weights(path, device or (None if meta else default_device()), device_map, weights)
    if path.startswith((".", "~", "/")):
        path = str(expanded(path).resolve())
        if not Path(path).is_dir() and not (meta and config):
            raise _lost(path, FileNotFoundError("no such folder"))
    if device is not None and device_map is not None:
        raise ConfigError(
            f"model=hf: device={device!r} and device_map={device_map!r} both say where; give one "
            "of them, the other null"
        )
    if compute is not None and device_map is not None:
        raise ConfigError("model.compute=float32 converts weights in place: give device_map=null")
    if revision and Path(path).is_dir():
        raise ConfigError(
            f"model=hf: revision={revision!r} is of a model on the hub, and path={path!r} is a "
            "folder of this machine; give revision=null"
        )
    if (Path(path) / MANIFEST).is_file():
        home = "cpu" if weights == "host" else device
        model, tokenizer = _pruned(path, dtype_name, home, device_map, meta)
        return _settled(model, weights, device, device_map, compute), tokenizer
    if Path(path).is_dir():
        check_plain(Path(path))
    options: dict[str, Any] = {
        "revision": revision or "main",
        "trust_remote_code": trust_remote_code,
    }
    loader = getattr(transformers, auto)
    if meta:
        found = _config(path, config, options)
        kind = {} if dtype == "auto" else {"dtype": getattr(torch, dtype_name)}
        with torch.device("meta"):
            shapes = loader.from_config(found, trust_remote_code=trust_remote_code, **kind)
        return shapes.eval(), _tokenizer_at_hand(path, options)
    found = _config(path, None, options)
    options["dtype"] = "auto" if dtype == "auto" else getattr(torch, dtype_name)
    model, tokenizer = _read(loader, path, found, weights, device_map, options)
    return _settled(model, weights, device, device_map, compute), tokenizer
