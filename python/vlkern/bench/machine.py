"""The machine: its name and its own ceilings, measured in the same run as the ops."""

import importlib.util
import os
import platform
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import vlkern
from vlkern._malloc import recycle_memory
from vlkern.bench.rivals import open_clip_version
from vlkern.bench.timing import Clock, race

_MATMULS = {"cpu": (1024, 2048, 4096), "cuda": (4096, 8192, 16384)}
_SLOW_MS = 1000.0


def _cpu() -> tuple[str, list[str]]:
    """Model name and flags."""
    fields = {"model name": platform.processor() or platform.machine(), "flags": ""}
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        key, _, value = line.partition(":")
        if key.strip() in fields:
            fields[key.strip()] = value.strip()
    return fields["model name"], fields["flags"].split()


def hardware(device: str) -> dict[str, Any]:
    """What the results depend on; `slug` names the folder they go to."""
    name, flags = _cpu()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found: dict[str, Any] = {
        "cpu": name,
        "cores": cores,
        "threads": torch.get_num_threads(),
        "simd": [f for f in ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16") if f in flags],
    }
    words = re.sub(r"\((r|tm)\)|processor|cpu|@.*", " ", name.lower())
    label = f"{words} {'amx' if 'amx_bf16' in flags else ''} {cores}c"
    if device == "cuda":
        found["gpu"] = label = torch.cuda.get_device_name()
    return {"slug": "-".join(re.findall(r"[a-z0-9]+", label.lower())), **found}


def versions() -> dict[str, str]:
    """Of everything that took part."""
    found = {"python": platform.python_version(), "vlkern": vlkern.__version__, "torch": torch.__version__}
    for package in ("triton", "liger_kernel", "vector_quantize_pytorch"):
        if importlib.util.find_spec(package):
            found[package] = version(package)
    if (clip := open_clip_version()) is not None:
        found["open_clip"] = clip
    return found


def copy_rates(device: str, mebibytes: int) -> dict[str, float]:
    """GB/s, reads plus writes, of copying into an existing tensor and of clone(), which needs a fresh one."""
    source = torch.ones(mebibytes << 18, device=device)
    target = torch.zeros_like(source)
    calls = {"copy": lambda: target.copy_(source), "clone": lambda: source.clone()}
    for call in calls.values():
        call()
    best = {name: min(t) for name, t in race(calls, Clock(device, cold=False), 5, fixed=True).items()}
    return {name: 2e-6 * source.nbytes / ms for name, ms in best.items()}


def reader(source: torch.Tensor) -> Callable[[], object]:
    """A call that reads a float32 tensor once, as fast as memory gives it."""
    return source.sum


def read_rate(device: str, mebibytes: int) -> float:
    """GB/s of reading."""
    source = torch.ones(mebibytes << 18, device=device)
    return 1e-6 * source.nbytes / min(race({"read": reader(source)}, Clock(device, cold=False), 7, fixed=True)["read"])


def matmul_rate(device: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> float:
    """TFLOP/s of the fastest of a few square matmuls; sizes beyond one that takes a second are not tried."""
    clock, best = Clock(device, cold=False), 0.0
    for n in sizes:
        a, b = (torch.randn(n, n).to(device, dtype) for _ in range(2))
        out = torch.empty_like(a)
        first = clock(lambda: torch.mm(a, b, out=out))  # noqa: B023
        times = [first] if first > _SLOW_MS else [clock(lambda: torch.mm(a, b, out=out)) for _ in range(4)]  # noqa: B023
        best = max(best, 2e-9 * n**3 / min(times))
        if first > _SLOW_MS:
            break
    return best


def matmul_rates(device: str, dtypes: dict[str, torch.dtype], sizes: tuple[int, ...]) -> dict[str, float]:
    """name -> TFLOP/s. Where PyTorch has no fast matmul in a narrow dtype, float32 is the ceiling: widening is free."""
    fp32 = matmul_rate(device, torch.float32, sizes)
    return {
        name: fp32 if dtype == torch.float32 else max(fp32, matmul_rate(device, dtype, sizes))
        for name, dtype in dtypes.items()
    }


def ceilings(device: str, dtypes: dict[str, torch.dtype], quick: bool = False, recycle: bool = True) -> dict[str, Any]:
    """Copy rates in GB/s, with and without recycled memory on the CPU, and matmul rates in TFLOP/s.

    Turns recycling on for the rest of the process, if `recycle`.
    """
    mebibytes = 64 if quick else 512
    sizes = _MATMULS[device][: 1 if quick else None]
    found: dict[str, Any] = {}
    if device == "cpu":
        found["copy_GBps_default_malloc"] = copy_rates(device, mebibytes)
        found["memory_is_recycled"] = recycle and recycle_memory()
    found["copy_GBps"] = copy_rates(device, mebibytes)
    found["matmul_TFLOPs"] = matmul_rates(device, dtypes, sizes)
    return found


def check_device(device: str) -> str:
    """`device`, which must be cpu or cuda and exist."""
    if device not in _MATMULS:
        raise ValueError(f"device must be one of {', '.join(_MATMULS)}, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was chosen, but torch.cuda.is_available() is False")
    return device
