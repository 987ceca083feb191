"""Types of GGUF that llama.cpp's own quantiser makes: it is called in the library that the package
xllamacpp brings, a tensor at a time.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from prunekit.errors import ConfigError
from prunekit.export.engine_process import interpreter

Quantise = Callable[[Any, Any], Any]
"""Float32 rows and a type of GGUF -> bytes, `(..., bytes of a row)` uint8."""
WHERE = "import importlib.util as u; print(u.find_spec('xllamacpp').origin)"


def engine_quantiser() -> Quantise:
    """llama.cpp's quantiser, without an importance matrix. Raises ConfigError where there is no
    llama.cpp, or a build of it that does not show the function.
    """
    python = interpreter("llama.cpp")
    found = subprocess.run([python, "-c", WHERE], capture_output=True, text=True, check=True)
    function = _function(Path(found.stdout.strip()).parent)

    def quantise(rows: Any, coding: Any) -> Any:
        from gguf import quant_shape_to_byte_shape

        rows = np.ascontiguousarray(rows, dtype=np.float32)
        out = np.empty(quant_shape_to_byte_shape(rows.shape, coding), dtype=np.uint8)
        width = rows.shape[-1]
        size = function(
            coding.value, rows.ctypes.data, out.ctypes.data, 0, rows.size // width, width, None
        )
        if size != out.nbytes:
            raise RuntimeError(f"llama.cpp wrote {size} bytes of {out.nbytes} as {coding.name}")
        return out

    return quantise


@cache
def _function(folder: Path) -> Any:
    for path in sorted(folder.glob("*xllamacpp*")):
        if path.suffix in (".so", ".pyd", ".dylib"):
            function = getattr(ctypes.CDLL(str(path)), "ggml_quantize_chunk", None)
            if function is not None:
                long, pointer = ctypes.c_int64, ctypes.c_void_p
                function.argtypes = [ctypes.c_int, pointer, pointer, long, long, long, pointer]
                function.restype = ctypes.c_size_t
                return function
    raise ConfigError(
        f"llama.cpp in {folder} does not show its quantiser; possible types: f32, f16, bf16, q8_0"
    )
