"""`vlkern info`: versions, what was built, what this machine offers, and which backends each op has here."""

import argparse
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

import vlkern
from vlkern._native import LIBRARIES, TRITON_INTERPRETS, host
from vlkern._op import BACKENDS, REGISTRY, Op

#: flag in /proc/cpuinfo -> its usual name
_FEATURES = {
    "avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX-512 BF16", "avx512_fp16": "AVX-512 FP16",
    "amx_bf16": "AMX BF16", "amx_int8": "AMX INT8", "asimd": "NEON", "bf16": "NEON BF16",
}  # fmt: skip
_PACKAGES = ("numpy", "triton", "pillow", "webdataset", "rich", "matplotlib", "transformers", "open_clip_torch")


def _cpuinfo(field: str) -> str:
    """The first value of a field of /proc/cpuinfo; empty where there is none (macOS, Windows)."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field), "")


def cpu_features() -> list[str]:
    """Vector and matrix extensions of this CPU that matter here, by their usual names."""
    flags = (_cpuinfo("flags") or _cpuinfo("Features")).split()
    return [name for flag, name in _FEATURES.items() if flag in flags]


def fast_bfloat16(device: str) -> bool:
    """Whether matmuls are faster in bfloat16 than in float32 on this kind of device."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return "AMX BF16" in cpu_features()


def _cpu() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "name": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "memory_GiB": round(memory / 2**30, 1),
        "features": cpu_features(),
    }


def _gpus() -> list[dict[str, Any]]:
    found = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found.append(
            {"name": p.name, "capability": f"{p.major}.{p.minor}", "memory_GiB": round(p.total_memory / 2**30, 1)}
        )
    return found


def _built() -> dict[str, str]:
    """library -> "yes", or "no: " and the reason."""
    built = {name: f"no: {why}" if why else "yes" for name, why in LIBRARIES.items()}
    try:
        host()
        built["_host"] = "yes"
    except ImportError as error:
        built["_host"] = f"no: {error}"
    return built


def _here(op: Op, backend: str) -> str:
    """ "yes" when the backend can run on this machine, else "no: " and the reason."""
    if op.missing[backend]:
        return f"no: {op.missing[backend]}"
    if backend in ("triton", "cuda") and not torch.cuda.is_available():
        if backend == "triton" and TRITON_INTERPRETS:
            return "yes: in the interpreter, when chosen explicitly"
        return "no: PyTorch sees no GPU"
    return "yes"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def collect() -> dict[str, Any]:
    """Everything that `vlkern info --json` prints."""
    versions = {"vlkern": vlkern.__version__, "python": platform.python_version(), "torch": torch.__version__}
    return {
        "versions": versions | {p: v for p in _PACKAGES if (v := _version(p))},
        "built": _built(),
        "cpu": _cpu(),
        "gpus": _gpus(),
        "ops": {op.public: {b: _here(op, b) for b in BACKENDS} for op in REGISTRY.values()},
    }


def text(found: dict[str, Any]) -> str:
    """The same as plain text."""
    cpu = found["cpu"]
    lines = ["versions", "  " + ", ".join(f"{name} {v}" for name, v in found["versions"].items()), "", "built"]
    lines += [f"  {name:<9}{why}" for name, why in found["built"].items()]
    lines += ["", "machine", f"  {'cpu':<9}{cpu['name']}: {cpu['cores']} cores ({cpu['threads']} threads used)"]
    lines[-1] += f", {cpu['memory_GiB']} GiB memory"
    lines += [f"  {'':<9}{', '.join(cpu['features']) or 'no vector extension that matters here'}"]
    for gpu in found["gpus"]:
        lines.append(f"  {'gpu':<9}{gpu['name']}: capability {gpu['capability']}, {gpu['memory_GiB']} GiB memory")
    if not found["gpus"]:
        lines.append(f"  {'gpu':<9}none that PyTorch can use")
    for op, backends in found["ops"].items():
        lines += ["", op, *(f"  {name:<11}{why}" for name, why in backends.items())]
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vlkern info`."""
    parser.add_argument("--json", action="store_true", help="machine-readable")


def run(args: argparse.Namespace) -> int:
    """Prints and returns 0."""
    found = collect()
    print(json.dumps(found, indent=2) if args.json else text(found))
    return 0
