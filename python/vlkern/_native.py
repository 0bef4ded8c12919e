"""Loads the native libraries that were built and remembers why the others are missing."""

import os
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch

_HERE = Path(__file__).parent


def _load(name: str) -> str | None:
    path = _HERE / f"{name}.so"
    if not path.exists():
        return f"{name} was not built" + (" (no nvcc at build time?)" if name == "_C_cuda" else "")
    if name == "_C_cuda" and not torch.version.cuda:
        return "this PyTorch is a CPU-only build"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{name} failed to load: {error}"
    return None


def host() -> ModuleType:
    """The pybind11 module of tensor-free C++."""
    try:
        return import_module("vlkern._host")
    except ImportError as error:
        raise ImportError("vlkern._host was not built: install vlkern with a C++ compiler at hand") from error


#: Triton's interpreter runs kernels on CPU tensors; it is chosen before Triton is imported.
TRITON_INTERPRETS: bool = os.environ.get("TRITON_INTERPRET", "0") == "1"

#: library -> why it is missing, or None when it is loaded
LIBRARIES: dict[str, str | None] = {name: _load(name) for name in ("_C", "_C_cuda")}
