"""The library of CUDA kernels beside a PyTorch that cannot use it."""

from pathlib import Path

import pytest
import torch

import vlkern
from vlkern._native import LIBRARIES
from vlkern._op import REGISTRY

BUILT = (Path(vlkern.__file__).parent / "_C_cuda.so").exists()


@pytest.mark.skipif(bool(torch.version.cuda), reason="this PyTorch has CUDA, so the library loads")
@pytest.mark.parametrize("op", [op for op in REGISTRY.values() if "cuda" in op.backends], ids=lambda op: op.name)
def test_cpu_only_pytorch_says_why_there_is_no_cuda_backend(op):
    expected = "this PyTorch is a CPU-only build" if BUILT else "_C_cuda was not built (no nvcc at build time?)"
    assert op.missing["cuda"] == expected
    with pytest.raises(RuntimeError, match="'cuda' was chosen and cannot run"), vlkern.backend(f"{op.name}=cuda"):
        op.choose(torch.ones(1))


@pytest.mark.skipif(not (BUILT and torch.version.cuda), reason="needs the library and a PyTorch with CUDA")
def test_library_loads_where_pytorch_has_cuda():
    """Also on a machine without a GPU: every symbol that the kernels need is found when the library is opened."""
    assert LIBRARIES["_C_cuda"] is None
    for op in REGISTRY.values():
        if "cuda" in op.backends:
            assert op.missing["cuda"] is None
