"""Rooms compiled for an emulated GPU (emulator/), and what their kernels compute there against the reference.

The undefined-behaviour sanitiser is on, so a vector access to a misaligned address fails as it would on a GPU.
"""

import subprocess
from pathlib import Path

import pytest
import torch
from rooms import ROOT

from vlkern._op import REGISTRY
from vlkern.testing import assert_as_good, assert_same_direction, in_float64, poison

HERE, TORCH = Path(__file__).parent / "emulator", Path(torch.__file__).parent
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])

FLAGS = [
    *["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden"],
    *["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fsanitize=undefined", "-fno-sanitize-recover=all"],
    "-fno-sanitize=null,vptr",  # which ends the process anyway, and is not there; they make up a third of the code
    *["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"],
    *["-I", HERE, "-I", ROOT / "csrc", "-isystem", TORCH / "include"],
]
LIBRARIES = [TORCH / "lib/libtorch_cpu.so", TORCH / "lib/libc10.so", "-ldl"]
#: What every file includes, parsed once.
COMMON = ["bit", "cmath", "deque", "functional", "ucontext.h", "vlkern.h"]


class Emulator:
    """Compiles files of kernels and loads them. Their `.cuda` overloads then take CPU tensors in this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        header = folder / "common.h"
        header.write_text("".join(f"#include <{name}>\n" for name in COMMON))
        subprocess.run(["g++", *FLAGS, "-x", "c++-header", header, "-o", folder / "common.h.gch"], check=True)

    def load(self, source: Path, name: str, include: Path) -> None:
        """One file, which finds its headers in the folder `include`."""
        library = self.folder / f"{name}.so"
        more = ["-I", self.folder, "-include", "common.h", f'-DVLKERN_SOURCE="{source}"', "-I", include]
        linked = ["-shared", "-Wl,-Bsymbolic", HERE / "emulator.cpp", *LIBRARIES, "-o", library]
        subprocess.run(["g++", *FLAGS, *more, *linked], check=True)
        torch.ops.load_library(library)


def run(op, raw, backend, *args):
    with poison():
        result = REGISTRY[op].raw[raw][backend](*args)
    return result if isinstance(result, tuple) else (result,)


def compare(op, raw, args, gradients=False, magnitudes=None):
    """Against the reference in float64; the same bits the second time. Returns what the kernels computed."""
    ours, low = run(op, raw, "cuda", *args), run(op, raw, "reference", *args)
    exact = run(op, raw, "reference", *in_float64(args))
    for one, two, three, magnitude in zip(ours, low, exact, magnitudes or [None] * len(ours), strict=True):
        # The float32 gradients of float16 embeddings come from a float16 G, and reach the user as float16.
        results = [t.half() if args[0].dtype == torch.float16 and t.dim() == 2 else t for t in (one, two)] + [three]
        assert_as_good(*results, magnitude=magnitude)
        if gradients:
            assert_same_direction(*results)
    assert all(torch.equal(a, b) for a, b in zip(ours, run(op, raw, "cuda", *args), strict=True))
    return ours


def misaligned(t):
    """The same values one element past a 16-byte boundary, NaN before and after."""
    room = torch.full((t.numel() + 64,), float("nan"), dtype=t.dtype)
    start = next(i for i in range(1, 64) if room[i:].data_ptr() % 16 == t.element_size())
    room[start : start + t.numel()] = t.flatten()
    return room[start : start + t.numel()].view(t.shape)
